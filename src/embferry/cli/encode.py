"""``embferry encode``: one encode worker."""

from __future__ import annotations

from embferry.cli.options import settings_command
from embferry.cli.workers import checked_model
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start an encode worker: pictures in, embeddings out."""
    checked_model(settings)
    from embferry.serve.encode.server import run

    run(settings)


command = settings_command(("encode",), ("", "transfer", "media", "encode"), _run)
