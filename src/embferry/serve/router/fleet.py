"""The workers that there are, and which of them is next."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec

from embferry.discovery.leases import Role, Worker, WorkerList
from embferry.observe.metrics import RouterMetrics
from embferry.protocol.errors import LocalProtocolError
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.answers import read_json
from embferry.serve.http.backends import Backends, KnownWorker, reason_of
from embferry.serve.http.calls import add_digests, checked_body
from embferry.serve.http.journal import EventKind
from embferry.serve.http.proofs import ProvedRequests, worker_context
from embferry.serve.openai.reply import model_object
from embferry.serve.router.worker_source import BootstrapSource, NoListError, WorkerSource
from embferry.trust.digests import DamagedError
from embferry.trust.trust import Trust

log = logging.getLogger(__name__)

ROLES: tuple[Role, ...] = get_args(Role)
SUSPECT_SECONDS = 10.0
"""How long a worker that has failed is asked last."""


class Fleet(Backends[RouterMetrics]):
    """The workers that there are, by the last list of their source. Leases expire at the bootstrap server, not here.

    Args:
        settings: all of them.
        transport: replaces the network in tests.
        source: lists the workers; the bootstrap server if None.
    """

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        source: WorkerSource | None = None,
    ) -> None:
        self._trust = Trust.of_environment()
        super().__init__(settings, RouterMetrics(), transport)
        name = settings.public_model_name
        self._models = {name: model_object(name, int(time.time()))}
        self._source = source or BootstrapSource(settings, self.control, self._trust)
        self._keys = self._trust.keys
        self._proofs: dict[str, ProvedRequests] = {}  # by worker
        self._dropped: set[str] = set()  # leases that have been reported
        self._workers: tuple[Worker, ...] = ()
        self._last_list: float | None = None  # monotonic seconds
        self._trouble = f"{self._source.address} has not been asked yet"
        self._is_warned = False  # of the trouble that there is now
        self._refreshing = asyncio.Lock()
        self._refreshes = 0  # that have ended
        self._suspected: dict[str, float] = {}  # monotonic seconds, by worker
        for role in ROLES:
            self.metrics.set_workers(role, 0)

    def certificates(self) -> ssl.SSLContext | None:
        return None if self._trust.tls is None else self._trust.tls.renewed(self._trust.tls.dialling)

    async def watch(self) -> None:
        while True:
            await self.refresh()
            await self._source.wait()

    async def refresh(self) -> None:
        """Asks for the list once. A call during another one shares its answer.

        On failure the last list stays in use: its workers may well be alive.
        """
        ended = self._refreshes
        async with self._refreshing:
            if self._refreshes == ended:
                await self._refresh()
                self._refreshes += 1

    async def _refresh(self) -> None:
        try:
            listed = await self._source.read()
            self._replace(self._usable(listed), keep=not listed.complete)
        except NoListError as error:
            if not self._is_warned:
                log.warning("the list of workers is not available", extra={"reason": str(error)})
            self._is_warned = True
            self._trouble = str(error)

    def _usable(self, listed: WorkerList) -> tuple[Worker, ...]:
        """Returns the workers of our model. A lease that is not valid is left out and logged once."""
        workers, invalid = listed.read()
        dropped = dict(invalid)
        for worker in workers:
            try:
                self._trust.check_url(worker.url, "its URL")
            except LocalProtocolError as error:
                dropped[worker.id] = error.detail
        workers = tuple(worker for worker in workers if worker.id not in dropped)
        for lease in dropped.keys() - self._dropped:
            log.warning("a lease is left out", extra={"lease": lease, "reason": dropped[lease]})
        self._dropped = set(dropped)
        model = self.settings.model_name
        # Senders and receivers of the library register too, without an HTTP server; the router cannot use them.
        ours = (worker for worker in workers if worker.url and Path(worker.model or model).name == model)
        return tuple(msgspec.structs.replace(worker, url=worker.url.rstrip("/")) for worker in ours)

    def _replace(self, workers: tuple[Worker, ...], *, keep: bool) -> None:
        """Replaces the list. ``keep``: those that are missing in it stay."""
        if keep:
            listed = {worker.id for worker in workers}
            workers = (*workers, *(worker for worker in self._workers if worker.id not in listed))
        now, before = ({w.id: w for w in some} for some in (workers, self._workers))
        for word, ids in (("joined", now.keys() - before.keys()), ("left", before.keys() - now.keys())):
            for worker in map((now | before).__getitem__, sorted(ids)):
                log.info("worker %s", word, extra={"worker": worker.id, "role": worker.role, "url": worker.url})
                kind: EventKind = "worker_found" if word == "joined" else "worker_lost"
                self.journal.event(kind, worker=worker.id, role=worker.role)
        self._workers, self._last_list, self._trouble, self._is_warned = workers, time.monotonic(), "", False
        self._proofs = {id: proof for id, proof in self._proofs.items() if id in now}
        for role in ROLES:
            self.metrics.set_workers(role, len(self._with_role(role)))

    def _with_role(self, role: Role) -> list[Worker]:
        return [worker for worker in self._workers if worker.role == role]

    def missing(self) -> list[str]:
        is_stale = self._last_list is None or time.monotonic() - self._last_list > self._source.stale_seconds
        late = f"{self._source.address} has sent no list for {self._source.stale_seconds:g} s"  # and no error so far
        problems = [self._trouble or late] if is_stale else []
        return problems + [self._source.absence(role) for role in ROLES if not self._with_role(role)]

    def counts(self) -> dict[str, int]:
        return {role: len(self._with_role(role)) for role in ROLES}

    def models(self) -> dict[str, dict[str, Any]]:
        return self._models

    def proof_of(self, worker: Worker) -> ProvedRequests:
        """Returns what proves the requests to a worker."""
        proof = self._proofs.get(worker.id)
        if proof is None:
            proof = ProvedRequests(self._keys, worker_context(worker.id), worker.url)
            self._proofs[worker.id] = proof
        return proof

    def suspect(self, worker: Worker) -> None:
        """Has the worker asked last for a while, after a failure that may be its own."""
        self._suspected = {id: until for id, until in self._suspected.items() if until > time.monotonic()}
        self._suspected[worker.id] = time.monotonic() + SUSPECT_SECONDS

    async def candidates(
        self, role: Role, avoid: Collection[str] = (), prefer: str | None = None, holder: str | None = None
    ) -> list[Worker]:
        """Returns the workers of a role, least loaded first; among equals, the least recently used first.

        Those that have failed lately come last. Those whose ids are in ``avoid`` are left out. The one with the id
        ``prefer`` comes first in any case, the one with the id ``holder`` first unless it has failed lately.

        Raises:
            ServeError: no_worker.
        """
        if not self._with_role(role):
            await self.refresh()  # a worker may have started since
        found = [worker for worker in self._with_role(role) if worker.id not in avoid]
        if not found:
            why = f" ({self._trouble})" if self._trouble else ""
            raise ServeError("no_worker", f"there is no {role} worker{why}; try again when one has started")
        now = time.monotonic()

        def order(worker: Worker) -> tuple[bool, bool, bool, float, int]:
            is_suspect = self._suspected.get(worker.id, now) > now
            return (
                worker.id != prefer,
                is_suspect,
                worker.id != holder,
                worker.load + self.in_flight[worker.id],
                self.last_turn.get(worker.id, -1),
            )

        return sorted(found, key=order)

    def known(self) -> list[KnownWorker]:
        now = time.monotonic()

        def page(worker: Worker) -> KnownWorker:
            is_suspect = self._suspected.get(worker.id, now) > now
            return KnownWorker(
                worker.id, worker.role, worker.url, (worker.model or self.settings.model_name,), not is_suspect,
                self.in_flight[worker.id], worker.load, "it has failed lately and is asked last" if is_suspect else "",
            )  # fmt: skip

        return [page(worker) for worker in self._workers]

    async def pools(self) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*map(self._pool, self._with_role("language"))))

    async def _pool(self, worker: Worker) -> dict[str, Any]:
        """Returns the receive pool of a language worker, or why there is no answer."""
        asked = {"worker": worker.id, "url": worker.url}
        request = self.control.build_request("GET", f"{worker.url}/debug/pool")
        try:
            async with asyncio.timeout(self.settings.router.connect_timeout):
                response = await self.control.send(add_digests(request), auth=self.proof_of(worker))
            if response.status_code != 200:
                return asked | {"error": f"status {response.status_code}"}
            return asked | dict(read_json(await checked_body(response)))
        except (httpx.HTTPError, DamagedError, ValueError, TypeError, TimeoutError) as error:
            return asked | {"error": reason_of(error)}

    async def check_language(self, avoid: Collection[str] = ()) -> None:
        """Refuses what no language worker can answer, before anything is done for it.

        If all have failed lately, one of them must answer now: the lease of a killed one has not ended yet.

        Raises:
            ServeError: no_worker.
        """
        found = await self.candidates("language", avoid)
        now = time.monotonic()
        if all(self._suspected.get(worker.id, now) > now for worker in found):
            answers = await asyncio.gather(*map(self._trouble_of, found))
            if all(answers):
                raise ServeError("no_worker", f"no language worker answers ({'; '.join(answers)}); try again later")

    async def _trouble_of(self, worker: Worker) -> str:
        """Returns why a worker does not answer now; empty if it does."""
        try:
            async with asyncio.timeout(self.settings.router.connect_timeout):
                request = self.control.build_request("GET", f"{worker.url}/health")
                await self.control.send(add_digests(request), auth=self.proof_of(worker))
        except (httpx.HTTPError, TimeoutError) as error:
            return f"{worker.id} at {worker.url}: {reason_of(error)}"
        return ""

    def has_another(self, role: Role, avoid: Collection[str]) -> bool:
        """Returns whether there is a worker of this role that is not in ``avoid``."""
        return any(worker.id not in avoid for worker in self._with_role(role))
