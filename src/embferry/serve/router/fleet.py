"""Which workers there are, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import httpx

from embferry.observe.metrics import RouterMetrics
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError

log = logging.getLogger(__name__)

Role = Literal["encode", "language"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, order=True)
class Worker:
    """``load``: requests in hand, as the worker itself last said."""

    id: str
    role: Role
    url: str
    load: float


class Fleet:
    """The workers with a live lease, as the bootstrap server last told. Leases expire there, not here."""

    def __init__(self, settings: Settings, client: httpx.AsyncClient, metrics: RouterMetrics) -> None:
        self._settings = settings
        self._client = client
        self._metrics = metrics
        self._workers: tuple[Worker, ...] = ()
        self._seen: float | None = None  # when the bootstrap server last answered, monotonic seconds
        self._trouble = "the bootstrap server has not been asked yet"
        self._in_hand: Counter[str] = Counter()  # requests of this router, by worker
        self._turn = itertools.count()
        self._last_turn: dict[str, int] = {}
        self._look = asyncio.Lock()

    async def watch(self) -> None:
        """Looks at the list every ``router.poll_interval``, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._settings.router.poll_interval)

    async def refresh(self) -> None:
        """Looks at the list once. If it cannot be had, the last one stays in use: workers may well be there still."""
        async with self._look:
            address = f"{self._settings.bootstrap_url.rstrip('/')}/workers"
            try:
                response = await self._client.get(address, timeout=self._settings.router.connect_timeout)
                response.raise_for_status()
                self._replace(_workers(response.json(), self._settings.model_name))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                reason = str(error) or type(error).__name__
                if not self._trouble:
                    log.warning("the list of workers cannot be had", extra={"bootstrap": address, "reason": reason})
                self._trouble = f"the bootstrap server at {self._settings.bootstrap_url} gives no list: {reason}"

    def _replace(self, workers: tuple[Worker, ...]) -> None:
        now, before = ({w.id: w for w in some} for some in (workers, self._workers))
        for word, ids in (("joined", now.keys() - before.keys()), ("left", before.keys() - now.keys())):
            for worker in sorted((now | before)[id] for id in ids):
                log.info("worker %s", word, extra={"worker": worker.id, "role": worker.role, "url": worker.url})
        self._workers, self._seen, self._trouble = workers, time.monotonic(), ""
        for role in ROLES:
            self._metrics.workers.labels(role).set(len(self._of(role)))

    def _of(self, role: Role) -> list[Worker]:
        return [worker for worker in self._workers if worker.role == role]

    def missing(self) -> list[str]:
        """What keeps requests from being answered, one sentence each; empty when ready."""
        gone = self._seen is None or time.monotonic() - self._seen > self._settings.bootstrap.lease
        problems = [self._trouble] if gone else []
        return problems + [f"no {role} worker has a live lease" for role in ROLES if not self._of(role)]

    def counts(self) -> dict[str, int]:
        return {role: len(self._of(role)) for role in ROLES}

    async def candidates(self, role: Role) -> list[Worker]:
        """Workers of a role, the first to try in front: least loaded, of equals the one whose turn is longest ago.

        Raises:
            ServeError: no_worker.
        """
        if not self._of(role):
            await self.refresh()  # it may have come since
        found = self._of(role)
        if not found:
            why = f" ({self._trouble})" if self._trouble else ""
            raise ServeError("no_worker", f"no {role} worker is there{why}; try again when one has started")
        return sorted(found, key=lambda w: (w.load + self._in_hand[w.id], self._last_turn.get(w.id, -1)))

    @contextlib.contextmanager
    def in_hand(self, worker: Worker) -> Iterator[None]:
        """Counts a request against ``worker`` while it lasts."""
        self._in_hand[worker.id] += 1
        self._last_turn[worker.id] = next(self._turn)
        try:
            yield
        finally:
            self._in_hand[worker.id] -= 1


def _workers(body: Any, model: str) -> tuple[Worker, ...]:
    """Workers of our model. An entry that makes no sense spoils the whole list: better an old list than half a one."""
    if not isinstance(body, dict) or not isinstance(body.get("workers"), list):
        raise ValueError("the answer has no list of workers")
    found = []
    for entry in body["workers"]:
        try:
            same_model = Path(entry.get("model") or model).name == model
            # Senders and receivers of the library register too, without a server: not for us.
            if entry["role"] in ROLES and entry["url"] and same_model:
                found.append(
                    Worker(str(entry["id"]), entry["role"], _base_url(entry["url"]), float(entry["load"] or 0))
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an entry of the list of workers makes no sense: {entry!r}") from error
    return tuple(found)


def _base_url(text: str) -> str:
    """``text`` without a trailing slash. Raises ValueError unless it is an absolute http(s) URL."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"{text!r} is not the URL of a worker")
    return text.rstrip("/")
