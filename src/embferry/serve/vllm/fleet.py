"""Which instances of vLLM there are, which of them answer, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import httpx
import xxhash

from embferry.serve.config import Settings
from embferry.serve.vllm.metrics import VllmRouterMetrics

log = logging.getLogger(__name__)

Role = Literal["encode", "language"]
PROBE_SECONDS = 5.0
MAX_MISSES = 3
"""Probes that may run into their time-out before an instance counts as gone: one that is busy is slow to answer."""
REMEMBERED = 20_000
"""Items of which is known that an instance has encoded them."""

Life = tuple[str, int]
"""An instance between two of its ends: one that was started again is another one to try."""
MAX_LIVES = 2
"""Of an instance, that are tried for one thing: one that answers probes and nothing else comes back again and again."""


class Instance:
    """One ``vllm serve``. ``zmq``: the control address of its Mooncake connector, if it has one."""

    def __init__(self, role: Role, url: str, zmq: str | None = None) -> None:
        self.role = role
        self.url = url.rstrip("/")
        self.zmq = zmq
        self.up = False
        self.trouble = "has not been asked yet"
        self.models: dict[str, dict[str, Any]] = {}
        """Model objects by name, as ``/v1/models`` had them."""
        self.starts = 0
        self.misses = 0
        self.in_hand = 0
        self.last_turn = -1
        self.encoded: OrderedDict[str, None] = OrderedDict()
        self.asked = asyncio.Lock()
        self.suspected = asyncio.Event()

    @property
    def life(self) -> Life:
        return self.url, self.starts

    def remember(self, uuid: str) -> None:
        self.encoded[uuid] = None
        self.encoded.move_to_end(uuid)
        if len(self.encoded) > REMEMBERED:
            self.encoded.popitem(last=False)

    def __repr__(self) -> str:
        return f"the {self.role} instance at {self.url}"


class Fleet:
    """Probes all of them, for as long as :meth:`watch` runs."""

    def __init__(self, settings: Settings, client: httpx.AsyncClient, metrics: VllmRouterMetrics) -> None:
        mine = settings.vllm
        self._settings = settings
        self._client = client
        self._metrics = metrics
        zmq = mine.consumer_zmq or (None,) * len(mine.language_urls)
        self.encoders = [Instance("encode", url) for url in mine.encode_urls]
        self.languages = [
            Instance("language", url, address) for url, address in zip(mine.language_urls, zmq, strict=True)
        ]
        self._turn = itertools.count()
        key = settings.router.api_key
        self._headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}

    async def watch(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for instance in self.instances:
                group.create_task(self._keep(instance))

    @property
    def instances(self) -> list[Instance]:
        return [*self.encoders, *self.languages]

    async def encoder(
        self, uuid: str, model: str | None, tried: Collection[Life], avoid: Collection[str]
    ) -> Instance | None:
        """Whose turn it is to encode an item: the one its content always goes to (rendezvous hashing: Thaler and
        Ravishankar, 1998), unless that has much more in hand than the idlest. One of ``avoid`` only if there is no
        other. None if none is left to try.
        """
        able = _untried(await self._up(self.encoders, model), tried)
        able = [one for one in able if one.url not in avoid] or able
        if not able:
            return None
        home = max(able, key=lambda one: xxhash.xxh3_64_intdigest(f"{uuid} {one.url}".encode()))
        idlest = min(able, key=lambda one: one.in_hand)
        return idlest if home.in_hand - idlest.in_hand > self._settings.vllm.affinity_slack else home

    async def language(
        self, model: str | None, tried: Collection[Life], has: Callable[[Instance], int] = lambda _: 0
    ) -> Instance | None:
        """The one that ``has`` most of what it needs, among those that have little more in hand than the idlest; of
        equals the one with the least in hand, and then the one whose turn is longest ago.
        """
        able = _untried(await self._up(self.languages, model), tried)
        most = min((one.in_hand for one in able), default=0) + self._settings.vllm.affinity_slack
        near = [one for one in able if one.in_hand <= most]
        return min(near, key=lambda one: (-has(one), one.in_hand, one.last_turn), default=None)

    async def _up(self, instances: list[Instance], model: str | None) -> list[Instance]:
        if not any(one.up for one in instances):  # one may have come since
            await asyncio.gather(*(self._probe(one) for one in instances))
        up = [one for one in instances if one.up]
        # A name that nobody serves goes to anybody, who says so.
        return [one for one in up if model in one.models] or ([] if self._serves(model) else up)

    def _serves(self, model: str | None) -> bool:
        return any(model in one.models for one in self.instances)

    @contextlib.contextmanager
    def in_hand(self, instance: Instance) -> Iterator[None]:
        """Counts a request against it while it lasts."""
        instance.in_hand += 1
        instance.last_turn = next(self._turn)
        try:
            yield
        finally:
            instance.in_hand -= 1

    def failed(self, instance: Instance, error: Exception) -> str:
        """A call of it failed below HTTP. Returns what happened, in words."""
        what = f"{instance!r}: {str(error) or type(error).__name__}"
        self._metrics.instance_failures.labels(instance.role).inc()
        log.warning("%s", what)
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            instance.suspected.set()
        else:
            self._down(instance, str(error) or type(error).__name__)
        return what

    def suspect(self, instance: Instance) -> None:
        """Something behind it is not as it should be: it is probed at once."""
        instance.suspected.set()

    def missing(self) -> list[str]:
        """What keeps requests with pictures from being answered, a sentence each; empty when ready."""
        problems = []
        for role, instances in (("encode", self.encoders), ("language", self.languages)):
            if not any(one.up for one in instances):
                troubles = "; ".join(f"{one.url} {one.trouble}" for one in instances)
                problems.append(f"no {role} instance answers: {troubles}")
        if not problems and not self.models():
            served = "; ".join(f"{one.url} serves {', '.join(one.models)}" for one in self.instances if one.up)
            problems.append(f"no model is served by both an encode and a language instance: {served}")
        return problems

    def models(self) -> dict[str, dict[str, Any]]:
        """Models that instances of both roles serve."""
        encoded = {name for one in self.encoders if one.up for name in one.models}
        answered = {name: model for one in self.languages if one.up for name, model in one.models.items()}
        return {name: model for name, model in answered.items() if name in encoded}

    def counts(self) -> dict[str, int]:
        return {"encode": sum(one.up for one in self.encoders), "language": sum(one.up for one in self.languages)}

    async def _keep(self, instance: Instance) -> None:
        while True:
            await self._probe(instance)
            instance.suspected.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(instance.suspected.wait(), self._settings.router.poll_interval)

    async def _probe(self, instance: Instance) -> None:
        if instance.asked.locked():
            async with instance.asked:  # somebody is asking
                return
        async with instance.asked:
            try:
                if (health := await self._get(instance, "/health")).status_code != 200:
                    raise httpx.HTTPError(f"/health says {health.status_code}")
                if not instance.up:
                    models = await self._get(instance, "/v1/models")
                    instance.models = _models(models.raise_for_status().json())
                    self._come(instance)
                instance.misses = 0
            except (httpx.ReadTimeout, httpx.PoolTimeout) as error:
                instance.misses += 1
                if instance.misses >= MAX_MISSES:
                    self._down(instance, f"is silent: {type(error).__name__}")
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                self._down(instance, str(error) or type(error).__name__)

    async def _get(self, instance: Instance, path: str) -> httpx.Response:
        timeout = httpx.Timeout(PROBE_SECONDS, connect=self._settings.router.connect_timeout)
        return await self._client.get(instance.url + path, headers=self._headers, timeout=timeout)

    def _come(self, instance: Instance) -> None:
        instance.up, instance.trouble = True, ""
        instance.starts += 1
        instance.encoded.clear()
        log.info("%r answers, with %s", instance, ", ".join(instance.models))
        self._measure()

    def _down(self, instance: Instance, why: str) -> None:
        if instance.up:
            log.warning("%r does not answer: %s", instance, why)
        instance.up, instance.trouble = False, why
        self._measure()

    def _measure(self) -> None:
        for role, count in self.counts().items():
            self._metrics.instances.labels(role).set(count)


def _untried(instances: list[Instance], tried: Collection[Life]) -> list[Instance]:
    lives = Counter(url for url, _ in tried)
    return [one for one in instances if one.life not in tried and lives[one.url] < MAX_LIVES]


def _models(body: Any) -> dict[str, dict[str, Any]]:
    """Raises ValueError."""
    try:
        models = {str(model["id"]): dict(model) for model in body["data"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("/v1/models has no list of models; is this vllm serve?") from error
    if not models:
        raise ValueError("/v1/models lists no model")
    return models
