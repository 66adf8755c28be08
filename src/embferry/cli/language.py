"""``embferry language``: one language worker."""

from __future__ import annotations

from embferry.cli.options import settings_command
from embferry.cli.workers import checked_model
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start a language worker: prompts and embeddings in, answers out."""
    checked_model(settings)
    from embferry.serve.language.process import run

    run(settings)


command = settings_command(("language",), ("", "transfer", "language"), _run)
