"""``embferry serve``: a cluster in the foreground."""

from __future__ import annotations

import signal
import sys
import threading
import time

from embferry.serve.config import Settings
from embferry.serve.supervisor.cluster import LocalCluster
from embferry.serve.supervisor.slot import ClusterError
from embferry.serve.worker.transports import unusable


def run(settings: Settings) -> None:
    """Starts everything and serves until SIGINT or SIGTERM; a second one kills what has not ended by then.

    Exits with status 1 if it cannot be brought up, with status 2 if the settings ask for a transport that cannot be had.
    """
    if problems := unusable(settings):
        print(*(f"embferry: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        with LocalCluster(settings, progress=_say) as cluster:
            cluster.wait_ready()
            _say(f"{time.monotonic() - began:5.1f} s  ready: {settings.public_model_name} at {cluster.url}/v1")
            _say(f'         try: embferry ask --url {cluster.url} PICTURE "what is there?"    Ctrl-C ends everything')
            threading.Event().wait()
    except ClusterError as error:
        print(f"embferry: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _say("         all processes have ended")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
