"""``embferry encode``: one encode worker."""

from __future__ import annotations

from embferry.cli.options import settings_command
from embferry.cli.workers import checked_model
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start an encode worker: pictures and videos in, embeddings out."""
    checked_model(settings)
    from embferry.serve.encode.process import run

    run(settings)


command = settings_command(("encode",), ("", "transfer", "media", "encode"), _run)
