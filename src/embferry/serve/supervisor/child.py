"""``python -m embferry.serve.supervisor.child ROLE NAME``: one process of a cluster, started by the supervisor."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time

from embferry.observe.logs import configure, flush, own_process
from embferry.protocol.errors import EmbferryError
from embferry.protocol.text import MAX_DETAIL, printable
from embferry.serve import security
from embferry.serve.bootstrap import bootstrap_server
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.end_signals import EndSignals
from embferry.serve.http.address import bracketed
from embferry.serve.http.serving import Report
from embferry.serve.supervisor.handover import SupervisorPipes, unpack
from embferry.trust.trust import Trust

log = logging.getLogger("embferry.serve.supervisor.child")  # __name__ is "__main__" here

ORPHAN_SECONDS = 4.0
"""Seconds that a process gets for an orderly end when its supervisor has died."""
SAID_BY_SUPERVISOR = (
    "embferry.discovery.bootstrap_client",
    "embferry.discovery.bootstrap_server",
    "embferry.serve.router.fleet",
    "embferry.serve.router.process",
    "embferry.serve.worker.process",
)
"""Loggers whose info lines tell of the start and end of processes, which the supervisor's lines tell already."""


def main() -> None:
    pipes = SupervisorPipes()
    settings = unpack(pipes.first_line())
    pipes.on_supervisor_end(_end)
    own_process()
    configure(settings.log_level, settings.log_format, sys.argv[2])
    if settings.log_level == "info":
        for name in SAID_BY_SUPERVISOR:
            logging.getLogger(name).setLevel(logging.WARNING)
    try:
        security.apply(settings)
        if sys.argv[1] == "bootstrap":
            _bootstrap(settings, pipes.report)
        else:  # a process loads no more than it runs: torch takes seconds
            if sys.argv[1] in ("encode", "language"):
                log.info("loading torch and transformers")
            importlib.import_module(f"embferry.serve.{sys.argv[1]}.process").run(settings, pipes.report)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if pipes.reported:
            raise
        log.debug("cannot start", exc_info=error)
        pipes.fail(_reason(error, settings.log_level))
        sys.exit(1)
    _exit()


def _reason(error: Exception, log_level: str) -> str:
    """Returns one sentence that says why this process cannot start."""
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    if isinstance(error, EmbferryError):
        return error.detail
    text = printable(" ".join(str(error).split()), MAX_DETAIL)
    where = "the traceback is above" if log_level == "debug" else "--log-level debug shows the traceback"
    return f"{type(error).__name__}: {text or 'no reason given'} ({where})"


def _exit() -> None:
    """Ends a process that has closed everything. Unloading torch would take seconds on a busy machine, for nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    flush()
    os._exit(0)


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _bootstrap(settings: Settings, report: Report) -> None:
    with EndSignals() as signals, bootstrap_server(settings) as server:
        scheme = Trust.of_environment().scheme
        report(f"{scheme}://{bracketed(settings.reachable_host)}:{server.port}")
        signals.wait()


if __name__ == "__main__":
    main()
