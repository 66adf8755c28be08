"""``embferry serve``: everything on one machine."""

from __future__ import annotations

from embferry.cli.engines import check_serve
from embferry.cli.options import fail, settings_command
from embferry.cli.workers import checked_model
from embferry.observe.logs import configure
from embferry.serve.config import SECTIONS, Settings


def _run(settings: Settings, rest: list[str]) -> None:
    """Start everything on this machine.

    Bootstrap server, encode and language workers and the router, as processes that are started again when they die.
    With --engine vllm: instances of vLLM and the router; the arguments after -- go to each vllm serve.
    """
    if settings.router.engine == "vllm":
        configure(settings.log_level, settings.log_format)
        from embferry.serve.supervisor.vllm import run as run_vllm

        run_vllm(settings, rest)
        return
    if rest:
        fail(f"arguments for vllm serve need --engine vllm: {' '.join(rest)}")
    checked_model(settings)
    from embferry.serve.supervisor import run

    run(settings)


command = settings_command(("serve", "router", "vllm"), ("", *SECTIONS), _run, check_serve, rest="VLLM_ARGUMENTS")
