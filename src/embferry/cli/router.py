"""``embferry router``: the HTTP API."""

from __future__ import annotations

from embferry.cli.engines import fits_router
from embferry.cli.options import settings_command
from embferry.observe.logs import configure
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start the router: the OpenAI-compatible HTTP API.

    Before workers of this project; or, with --engine vllm, before instances of vLLM that run its encode/prefill/decode
    split: --encode-urls and the options after it.
    """
    configure(settings.log_level, settings.log_format)
    if settings.router.engine == "vllm":
        from embferry.serve.vllm.server import run
    else:
        from embferry.serve.router.server import run

    run(settings)


command = settings_command(("router", "vllm"), ("", "media", "router", "vllm"), _run, fits_router)
