"""``python -m embferry.serve.supervisor.child ROLE``: one process of a cluster. Started by the supervisor, not by hand.

Standard input brings the settings in one line, and then nothing until the parent ends: the kernel closes the pipe even
when the parent is killed, and that is the sign to end as well. (``PR_SET_PDEATHSIG`` would do for SIGKILL too, but it
goes by the thread that started the child, not by the process.) Standard output carries one line, when the process
answers; whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.observe.logs import configure
from embferry.serve.config import Settings
from embferry.serve.supervisor.handover import read_line, unpack
from embferry.serve.worker.address import bracketed
from embferry.serve.worker.process import Report, Started

ORPHAN_SECONDS = 4.0
"""Seconds a process whose parent has died gets for an orderly end."""


def main() -> None:
    role = sys.argv[1]
    control, status = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    try:
        settings = unpack(read_line(control))
    except EOFError:
        sys.exit(1)
    threading.Thread(target=_end_with_parent, args=(control,), name="parent", daemon=True).start()
    configure(settings.log_level, settings.log_format)

    def report(started: Started) -> None:
        os.write(status, json.dumps({"url": started.url}).encode() + b"\n")

    try:
        ROLES[role](settings, report)
    except KeyboardInterrupt:
        sys.exit(130)
    _leave()


def _leave() -> None:
    """Ends a process that has closed all it had. Taking torch's modules apart first would take seconds on a busy
    machine, and free what the kernel frees anyway.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent(control: int) -> None:
    while os.read(control, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _bootstrap(settings: Settings, report: Report) -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with BootstrapServer(settings.host, settings.bootstrap.port, lease_seconds=settings.bootstrap.lease) as server:
        report(Started(f"http://{bracketed(settings.reachable_host)}:{server.port}"))
        stop.wait()


def _router(settings: Settings, report: Report) -> None:
    if settings.router.engine == "vllm":  # here, so that a process loads no more than it runs
        from embferry.serve.vllm.server import run
    else:
        from embferry.serve.router.server import run

    run(settings, report)


def _encode(settings: Settings, report: Report) -> None:
    from embferry.serve.encode.process import run  # here, so that a router need not load torch

    run(settings, report)


def _language(settings: Settings, report: Report) -> None:
    from embferry.serve.language.process import run  # as above

    run(settings, report)


ROLES: dict[str, Callable[[Settings, Report], None]] = {
    "bootstrap": _bootstrap,
    "router": _router,
    "encode": _encode,
    "language": _language,
}

if __name__ == "__main__":
    main()
