"""The loss of Ray itself, under a cluster that this process has started."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType
from typing import Self

from ray._private import worker
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

from embferry.serve.supervisor.serve import show

POLL_SECONDS = 1.0
NEEDED = frozenset({PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET})
"""The processes of Ray without which the cluster is lost."""


class RayWatch:
    """Ends this process with status 1 if a process ends that its cluster needs. A context manager, used once.

    Such a process is not started again, and most calls of Ray would wait for it for ever, those that end the
    application among them. On a cluster that others have started, nothing is watched.
    """

    def __init__(self) -> None:
        self._node: Node | None = worker._global_node  # there is no public way to ask; None with a client of Ray's
        self._is_over = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="embferry-ray-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the watch, before Ray is ended on purpose. Idempotent."""
        if not self._is_stopping:  # a signal handler may call this within the call below, which is not reentrant
            self._is_stopping = True
            self._is_over.set()
            self._thread.join()

    def _run(self) -> None:
        while self._node is not None and not self._is_over.wait(POLL_SECONDS):
            if lost := _lost(self._node):
                logs = self._node.get_logs_dir_path()
                show([f"{lost}, and Ray cannot go on without it: start the command again. Ray's logs are in {logs}"])
                self._node.kill_all_processes(check_alive=False)
                os._exit(1)


def _lost(node: Node) -> str:
    """Returns how a process has ended that the cluster needs, in words; empty if all run."""
    for name, process in node.dead_processes():
        if name in NEEDED:
            status = process.returncode
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            return f"Ray's process {name} has ended {how}"
    return ""
