"""``embferry serve``: a cluster in the foreground."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from embferry.observe.logs import STDERR, is_json
from embferry.serve.config import Settings
from embferry.serve.end_signals import EndSignals
from embferry.serve.supervisor import ports
from embferry.serve.supervisor.cluster import Cluster
from embferry.serve.supervisor.first_question import ANSWER, KEY, ask_line, curl_line, needs_key
from embferry.serve.supervisor.local import LocalCluster
from embferry.serve.supervisor.process import ClusterError
from embferry.serve.worker.transports import unusable

log = logging.getLogger(__name__)

ENDING = "ending; Ctrl-C again ends at once"

Progress = Callable[[str], None]


def run(settings: Settings) -> None:
    """Starts everything and serves until SIGINT or SIGTERM; a second one kills the processes that are left.

    Ends the process with status 1 if it cannot be brought up, with status 2 if a transport in the settings is not
    usable.
    """
    if problems := unusable(settings):
        end(problems, 2)
    run_cluster(lambda progress: LocalCluster(settings, progress=progress))


def end(problems: Sequence[str], status: int) -> NoReturn:
    """Ends the process with a status and one line for each problem."""
    show(problems)
    sys.exit(status)


def show(problems: Sequence[str]) -> None:
    """Shows one line for each problem."""
    for problem in problems:
        if is_json():
            log.error("%s", problem)
        else:
            print(f"embferry: {problem}", file=sys.stderr, flush=True)


def invite(url: str, settings: Settings) -> None:
    """Shows how to ask the first question: on a terminal, lines that can be copied whole.

    Args:
        url: the router's.
        settings: of the deployment.
    """
    ask, curl = ask_line(url), curl_line(url, settings)
    needs = needs_key(settings)
    key = f", with an API key in {KEY}" if needs else ""
    if is_json():
        log.info("try it%s", key, extra={"ask": ask, "curl": curl, "answer": ANSWER})
    elif os.isatty(STDERR):
        for handler in logging.getLogger().handlers:
            handler.flush()  # the lines before these
        first = f"Try it in another terminal{f' that has an API key in {KEY}' if needs else ''}."
        second = f"The right answer is {ANSWER}. Ctrl-C here ends everything."
        print("", f"{first}\n{second}", ask, curl, "", sep="\n\n", file=sys.stderr, flush=True)
    else:
        log.info("the right answer to the next two lines is %s%s; Ctrl-C ends everything", ANSWER, key)
        log.info("try: %s", ask)
        log.info("or: %s", curl)


def run_cluster(make: Callable[[Progress], Cluster]) -> None:
    """Runs a cluster until SIGINT or SIGTERM; a second one kills the processes that are left.

    Ends the process with status 1 if the cluster cannot be brought up.
    """
    began = time.monotonic()
    interrupts = _Interrupts()
    with EndSignals(handle=interrupts) as signals:
        try:
            cluster = make(log.info)
            if taken := ports.problems(cluster.settings, cluster.wanted_ports()):
                end(taken, 1)
            interrupts.cluster = cluster
            try:
                cluster.start()
                cluster.wait_ready()
                log.info("ready: %s at %s/v1 after %.1f s", cluster.title, cluster.url, time.monotonic() - began)
                log.info("watch it at work: %s/", cluster.url)
                invite(cluster.url, cluster.settings)
                signals.wait()
            except KeyboardInterrupt:
                pass
            finally:
                if interrupts.count:
                    log.info(ENDING)
                interrupts.count += 1  # the next one kills, also if this end has another cause
                cluster.stop()
            log.info("all processes have ended")
        except ClusterError as error:
            end([str(error)], 1)


class _Interrupts:
    """The handler of SIGINT and SIGTERM.

    Without a cluster it raises KeyboardInterrupt. With one it raises nothing, wherever the main thread may be: the
    first signal ends :meth:`Cluster.wait_ready`, and others kill the processes.

    Attributes:
        cluster: the one that is started.
        count: the signals since then.
    """

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.count = 0

    def __call__(self) -> None:
        if self.cluster is None:
            raise KeyboardInterrupt
        self.count += 1
        if self.count == 1:
            self.cluster.interrupt()
        else:
            self.cluster.kill()
