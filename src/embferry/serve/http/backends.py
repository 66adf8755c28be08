"""The workers or instances behind a router."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import httpx

from embferry.observe.metrics import ChatMetrics
from embferry.serve.byte_budget import ByteBudget
from embferry.serve.config import Settings
from embferry.serve.http.descriptors import within_open_files
from embferry.serve.http.journal import Journal
from embferry.serve.media.fetch import Fetcher
from embferry.traces.otlp import open_tracer
from embferry.trust.bounded_answers import bounded_client

KEEPALIVE_CONNECTIONS = 64
MAX_CALLS, MAX_FETCHES = 16_384, 100
DESCRIPTORS, FETCHES_DESCRIPTORS = 0.3, 0.1
"""The parts of the process's descriptors that calls of requests, and fetches of media, may have; see
:mod:`.descriptors`."""


@dataclass(frozen=True, slots=True)
class KnownWorker:
    """A worker, or an instance of vLLM, as the router sees it.

    Attributes:
        id: of the process; of an instance, its URL.
        url: of its HTTP server.
        up: requests may go to it.
        in_flight: requests of this router.
        load: requests of all routers, as the worker has told last; None of an instance.
        trouble: why it is not up.
    """

    id: str
    role: str
    url: str
    models: tuple[str, ...]
    up: bool
    in_flight: int
    load: float | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Scraped:
    """Where Prometheus finds metrics.

    Attributes:
        url: base URL of the server that has them.
        part: what they are of: a role, or ``connector``.
        worker: the id of the worker.
    """

    url: str
    part: str
    worker: str


M = TypeVar("M", bound=ChatMetrics)


class Backends(ABC, Generic[M]):
    """Base of both fleets, with what every request to them needs.

    Args:
        settings: all of them.
        metrics: the router's.
        transport: replaces the network in tests.

    Attributes:
        keepalive_seconds: time until an idle connection is closed, long before a server closes it.
        client: for the calls of requests. It has no read time-out: ``router.request_timeout`` ends a long answer, a
            pause between two tokens does not. A call waits while the client has all the connections that it may have.
        control: for the few calls of the router itself, which must not wait for those of requests.
        fetcher: fetches the media of requests.
        budget: bounds the bytes of the requests being handled.
        own_addresses: IP addresses of backends that call this router, for whose connections room is kept.
        journal: what is done for requests.

    Raises:
        EmbferryError: traces are wanted, and OpenTelemetry is not installed.
    """

    keepalive_seconds: ClassVar[float] = 5.0

    def __init__(self, settings: Settings, metrics: M, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.settings, self.metrics = settings, metrics
        certificates = httpx.create_ssl_context(trust_env=False)  # slow to load, so loaded once
        timeout = httpx.Timeout(None, connect=settings.router.connect_timeout)
        verify = self.certificates() or certificates

        def client(most: int | None) -> httpx.AsyncClient:
            idle = min(KEEPALIVE_CONNECTIONS, most or KEEPALIVE_CONNECTIONS)
            limits = httpx.Limits(
                max_connections=most, max_keepalive_connections=idle, keepalive_expiry=self.keepalive_seconds
            )
            return bounded_client(timeout=timeout, limits=limits, verify=verify, transport=transport)

        self.client = client(within_open_files(MAX_CALLS, DESCRIPTORS))
        self.control = client(None)
        self.own_addresses: set[str] = set()
        traces, place = settings.traces, settings.place("traces", "endpoint")
        self._tracer = open_tracer(traces.endpoint, "embferry-router", traces.share, place)
        self.journal = Journal(tracer=self._tracer, tells_decode=settings.router.engine == "vllm")
        self.fetcher = Fetcher(settings.media, certificates, within_open_files(MAX_FETCHES, FETCHES_DESCRIPTORS))
        router = settings.router
        each = router.max_held_bytes_per_client
        self.budget = ByteBudget(
            router.max_held_bytes, "router.max_held_bytes", each, "router.max_held_bytes_per_client"
        )
        metrics.held_bytes.set_function(lambda: self.budget.held)
        self.in_flight: Counter[Hashable] = Counter()  # requests of this router, by backend
        self.last_turn: dict[Hashable, int] = {}
        self._turn = itertools.count()

    def certificates(self) -> ssl.SSLContext | None:
        """Returns the context for requests to backends, or None for those of public CAs."""
        return None

    async def close(self) -> None:
        await self.fetcher.close()
        await self.client.aclose()
        await self.control.aclose()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    @contextlib.contextmanager
    def count_in_flight(self, backend: Hashable) -> Iterator[None]:
        """Adds one to the backend's requests in flight while the context lasts."""
        self.in_flight[backend] += 1
        self.last_turn[backend] = next(self._turn)
        try:
            yield
        finally:
            self.in_flight[backend] -= 1

    @abstractmethod
    async def watch(self) -> None:
        """Keeps the state of the backends up to date until cancelled."""

    @abstractmethod
    def missing(self) -> list[str]:
        """Returns the reasons why a request with a picture would fail now, one sentence each; empty when ready."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Returns the number of usable backends by role."""

    @abstractmethod
    def models(self) -> Mapping[str, dict[str, Any]]:
        """Returns OpenAI's model objects by name."""

    @abstractmethod
    def known(self) -> list[KnownWorker]:
        """Returns every backend as this router sees it."""

    def scraped(self) -> list[Scraped]:
        """Returns where the metrics of the backends are."""
        return [Scraped(worker.url, worker.role, worker.id) for worker in self.known()]

    @abstractmethod
    async def pools(self) -> list[dict[str, Any]]:
        """Returns the receive pool of each language worker: its numbers, or the ``error`` of the question.

        Raises:
            ServeError: not_found; the backends have none that can be asked for.
        """


def reason_of(error: Exception) -> str:
    """Returns the text of an exception, which httpx leaves empty in some."""
    return str(error) or type(error).__name__
