"""Decides after a failed attempt at a request whether another one follows, and at which workers."""

from __future__ import annotations

import logging

from embferry.serve.errors import ServeError
from embferry.serve.http.journal import current_record
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.worker_call import WorkerLostError

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4


class Attempts:
    """The attempts at one request.

    After a damaged message the same worker is asked once more. After any other failure of a worker, or a second damaged
    message, other workers are asked, once. The encode worker of the attempt before is asked again unless it has failed:
    its cache may have the embedding.

    Attributes:
        avoid: ids of workers that are not asked again.
        prefer: id of the worker that is asked once more.
        encoder: id of the encode worker that the latest attempt has used.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.avoid: set[str] = set()
        self.prefer: str | None = None
        self.encoder: str | None = None
        self._fleet = fleet
        self._damaged: set[str] = set()  # ids of workers with one damaged message
        self._failures: list[ServeError] = []

    def another(self, error: WorkerLostError) -> bool:
        """Returns whether another attempt follows this failure of the latest one."""
        worker = error.worker
        if error.damaged and worker.id not in self._damaged:
            self._damaged.add(worker.id)
            self.prefer, follows = worker.id, True
        else:
            self.prefer, follows = None, not self.avoid
            self.avoid.add(worker.id)
            follows = follows and self._fleet.has_another(worker.role, self.avoid)
        if not follows or len(self._failures) + 1 >= MAX_ATTEMPTS:
            return False
        self._failures.append(error)
        log.warning("asking %s: %s", "once more" if self.prefer else "other workers", error.detail)
        self._fleet.metrics.second_attempts.inc()
        current_record().begins_again(error.code, worker.id)
        return True

    def explain(self, error: ServeError) -> None:
        """Adds the failures of earlier attempts to the error of the last one."""
        for earlier in reversed(self._failures):
            error.detail = f"{error.detail} (before that: {earlier.detail})"
