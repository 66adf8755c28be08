"""``embferry router``: the HTTP API."""

from __future__ import annotations

from embferry.cli.engines import check_router
from embferry.cli.options import settings_command
from embferry.observe.logs import configure
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start the router: the OpenAI-compatible HTTP API.

    It stands before workers of this project or, with --engine vllm, before instances of vLLM that run its
    encode/prefill/decode split: see --encode-urls and the options after it.
    """
    configure(settings.log_level, settings.log_format)
    from embferry.serve.router.process import run

    run(settings)


command = settings_command(("router", "vllm"), ("", "media", "router", "vllm"), _run, check_router)
