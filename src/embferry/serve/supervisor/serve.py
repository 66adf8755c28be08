"""``embferry serve``: a cluster in the foreground."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from embferry.serve.config import Settings
from embferry.serve.supervisor import ports
from embferry.serve.supervisor.cluster import Cluster
from embferry.serve.supervisor.local import LocalCluster
from embferry.serve.supervisor.process import ClusterError
from embferry.serve.worker.transports import unusable
from embferry.trust.trust import TLS_ENV

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


def run(settings: Settings) -> None:
    """Starts everything and serves until SIGINT or SIGTERM; a second one kills the processes that are left.

    Ends the process with status 1 if it cannot be brought up, with status 2 if a transport in the settings is not
    usable.
    """
    if problems := unusable(settings):
        _end(problems, 2)
    run_cluster(lambda progress: LocalCluster(settings, progress=progress))


def _end(problems: Sequence[str], status: int) -> NoReturn:
    print(*(f"embferry: {problem}" for problem in problems), sep="\n", file=sys.stderr)
    sys.exit(status)


def ask_options(url: str) -> str:
    """Returns the options with which ``embferry ask`` reaches the router at ``url``."""
    ca = os.environ.get(TLS_ENV[0], "")
    return f"--url {url} --ca {shlex.quote(ca)}" if ca and url.startswith("https:") else f"--url {url}"


def run_cluster(make: Callable[[Progress], Cluster]) -> None:
    """Runs a cluster until SIGINT or SIGTERM. Ends the process with status 1 if it cannot be brought up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        cluster = make(log.info)
        if taken := ports.problems(cluster.settings, cluster.wanted_ports()):
            _end(taken, 1)
        with cluster:
            cluster.wait_ready()
            log.info("ready: %s at %s/v1 after %.1f s", cluster.title, cluster.url, time.monotonic() - began)
            log.info('try: embferry ask %s PICTURE "what is there?" (Ctrl-C ends everything)', ask_options(cluster.url))
            threading.Event().wait()
    except ClusterError as error:
        _end([str(error)], 1)
    except KeyboardInterrupt:
        log.info("all processes have ended")
