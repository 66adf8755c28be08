"""The instances of vLLM: which of them answer, and which is asked next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import xxhash

from embferry.protocol.text import shown
from embferry.serve.config import LanguageSettings, Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.answers import read_json
from embferry.serve.http.backends import Backends, KnownWorker, Scraped, reason_of
from embferry.serve.http.calls import add_digests
from embferry.serve.vllm.instance import Incarnation, Instance, Role, named_in
from embferry.serve.vllm.instance_digests import whole_body
from embferry.serve.vllm.instance_models import models_of
from embferry.serve.vllm.instance_proofs import InstanceProver
from embferry.serve.vllm.instance_source import InstanceSource
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.trust.digests import DamagedError
from embferry.trust.trust import Trust

log = logging.getLogger(__name__)

MAX_INCARNATIONS = 2
"""Incarnations of an instance that are tried for one item: an instance may answer probes and fail every request."""


class Fleet(Backends[VllmRouterMetrics]):
    """Probes all instances for as long as :meth:`watch` runs.

    Args:
        settings: all of them.
        transport: replaces the network in tests.
        source: tells which instances there are from then on; the settings alone if None.

    Attributes:
        encoders: the instances that encode.
        languages: those that receive embeddings: language instances, or prefill instances where others decode.
        receiving: the role of these.
        decoders: decode instances; empty if language instances do both.
    """

    keepalive_seconds = 2.0  # vLLM closes an idle connection after 5 s; no request may go to one that is being closed

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        source: InstanceSource | None = None,
    ) -> None:
        super().__init__(settings, VllmRouterMetrics(), transport)
        self._source = source
        self.receiving: Role = "prefill" if settings.vllm.prefill_urls else "language"
        self._roles = named_in(settings.vllm)
        self.encoders, self.languages, self.decoders = self._roles.values()
        if not self.decoders:
            del self._roles["decode"]
        self._keys = Trust.of_environment().keys
        self._provers: MutableMapping[Instance, InstanceProver] = WeakKeyDictionary()
        for one in self.instances:
            self._provers[one] = InstanceProver(self._keys, one.url)
        key = settings.router.api_key
        self._headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._set_gauges()

    async def watch(self) -> None:
        async with asyncio.TaskGroup() as group:
            for instance in self.instances:
                group.create_task(self._watch(instance))
            while self._source is not None:
                for instance in self._changed(self._source):
                    group.create_task(self._watch(instance))
                await self._source.wait()

    def _changed(self, source: InstanceSource) -> list[Instance]:
        """Takes over the instances that there are. Returns the new ones.

        One that is not among them gets no new requests. It is probed until it has ended, for those that it still has.
        """
        added = []
        for role, instances in self._roles.items():
            urls = [url.rstrip("/") for url in source.urls(role)]
            for one in [one for one in instances if one.url not in urls]:
                log.info("%r is not counted any more", one)
                self.journal.event("worker_lost", worker=one.url, role=role)
                instances.remove(one)
            for url in [url for url in urls if url not in {one.url for one in instances}]:
                instance = Instance(role, url)
                self._provers[instance] = InstanceProver(self._keys, url)
                instances.append(instance)
                added.append(instance)
        self._set_gauges()
        return added

    @property
    def instances(self) -> list[Instance]:
        """Instances of all roles."""
        return [*self.encoders, *self.languages, *self.decoders]

    async def send(self, instance: Instance, request: httpx.Request) -> httpx.Response:
        """Sends a call of a request to an instance, and returns the answer with its body unread.

        Raises:
            httpx.TransportError: there is no answer, or it has no proof of the cluster key.
        """
        return await self._provers[instance].send(self.client, request)

    async def encoder(
        self, uuid: str, model: str | None, tried: Collection[Incarnation], avoid: Collection[str]
    ) -> Instance | None:
        """Returns the encoder for an item.

        An item has a home by its content (rendezvous hashing: Thaler and Ravishankar, 1998), and goes there unless its
        home has many more requests in flight than the least loaded encoder.

        Args:
            uuid: the item's name.
            model: the model that the instance has to serve.
            tried: encoders that are not returned again.
            avoid: URLs of encoders that are returned only if there is no other.

        Returns:
            None if no encoder is left.
        """
        able = _untried(await self._up(self.encoders, model), tried)
        able = [one for one in able if one.url not in avoid] or able
        able = [one for one in able if not one.unfit] or able
        if not able:
            return None
        home = max(able, key=lambda one: xxhash.xxh3_64_intdigest(f"{uuid} {one.url}".encode()))
        idlest = min(able, key=lambda one: self.in_flight[one])
        is_busy = self.in_flight[home] - self.in_flight[idlest] > self.settings.vllm.affinity_slack
        return idlest if is_busy else home

    async def language(
        self,
        model: str | None,
        tried: Collection[Incarnation],
        received: Callable[[Instance], int] = lambda _: 0,
        *,
        avoid: Collection[str] = (),
        decodes: bool = False,
    ) -> Instance | None:
        """Returns the language instance for a request, or None if none is left.

        Args:
            model: the model that the instance has to serve.
            tried: instances that are not returned again.
            received: returns how many of the request's embeddings an instance has. The highest number wins among those
                that are little more loaded than the least loaded one; then the least loaded, then the least recently
                used.
            avoid: URLs of instances that are returned only if there is no other.
            decodes: returns a decode instance instead.
        """
        able = _untried(await self._up(self.decoders if decodes else self.languages, model), tried)
        able = [one for one in able if one.url not in avoid] or able
        most = min((self.in_flight[one] for one in able), default=0) + self.settings.vllm.affinity_slack
        near = [one for one in able if self.in_flight[one] <= most]

        def order(one: Instance) -> tuple[int, int, int]:
            return -received(one), self.in_flight[one], self.last_turn.get(one, -1)

        return min(near, key=order, default=None)

    async def _up(self, instances: list[Instance], model: str | None) -> list[Instance]:
        if not any(one.up for one in instances):  # one may have started since
            await asyncio.gather(*(self._probe(one) for one in instances))
        up = [one for one in instances if one.up]
        # A model that no instance serves goes to any instance, whose error names it.
        return [one for one in up if model in one.models] or ([] if self._is_served(model) else up)

    def _is_served(self, model: str | None) -> bool:
        return any(model in one.models for one in self.instances)

    def check_model(self, model: str | None) -> None:
        """Checks that the model of a request with pictures is not one that some roles alone serve, such as an adapter.

        Raises:
            ServeError: model_not_found. Instances that do not answer count by what they have served.
        """
        serve = {role: [one for one in instances if model in one.models] for role, instances in self._roles.items()}
        found = [one for instances in serve.values() for one in instances]
        for role, instances in self._roles.items():
            if found and not serve[role] and all(one.models for one in instances):
                others = " and ".join(other for other in serve if serve[other])
                where = ", ".join(one.url for one in found)
                why = f"is served by {others} instances ({where}) and by no {role} instance, which pictures need"
                why = f"the model {shown(model, 80)} {why} as well; load it there, too"
                raise ServeError("model_not_found", why, param="model")

    def own_headers(self, name: str) -> dict[str, str]:
        """Returns the headers of a request of the router's own. ``name``: of the request."""
        return {"Content-Type": "application/json", "X-Request-Id": f"router-{name}", **self._headers}

    def is_refused(self, status: int) -> bool:
        """Returns whether an instance has refused the router's own API key, with which no client has to do."""
        return status == 401 and bool(self._headers)

    def failed(self, instance: Instance, error: Exception) -> str:
        """Notes that a call failed below HTTP. Returns a description."""
        reason = reason_of(error)
        self.metrics.worker_failures.labels(instance.role).inc()
        log.warning("%r: %s", instance, reason)
        self.journal.event("worker_failed", worker=instance.url, role=instance.role, reason=reason)
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            instance.suspected.set()
        else:
            self._set_down(instance, reason)
        return f"{instance!r}: {reason}"

    def damaged(self, instance: Instance, error: Exception) -> str:
        """Notes that a message to an instance or from it has arrived damaged. Returns a description."""
        self.metrics.damaged.labels(instance.role).inc()
        self.journal.event("damaged", worker=instance.url, role=instance.role)
        log.warning("what router and %r sent each other arrived damaged: %s", instance, error)
        return f"what router and {instance!r} sent each other arrived damaged: {error}"

    @contextlib.asynccontextmanager
    async def unless_stalled(self, instance: Instance) -> AsyncIterator[None]:
        """Bounds what waits for the instance, which may take long as long as the instance answers probes.

        Raises:
            httpx.ReadTimeout: the instance has stalled. What waited for it is cancelled.
        """
        limit = asyncio.timeout(0 if instance.is_stalled else None)
        try:
            async with limit:
                instance.waiting.add(limit)
                try:
                    yield
                finally:
                    instance.waiting.discard(limit)
        except TimeoutError as error:
            if not limit.expired():
                raise
            within = f"within {self.settings.router.stall_timeout:g} s (router.stall_timeout)"
            raise httpx.ReadTimeout(f"it has not answered a probe {within}") from error

    async def is_alive(self, instance: Instance) -> bool:
        """Returns whether the instance answers a probe now, and says that its engine is well."""
        try:
            await self._get(instance, "/health")
        except DamagedError:
            return True
        except (httpx.HTTPError, httpx.InvalidURL):
            return False
        return True

    def suspect(self, instance: Instance) -> None:
        """Has the instance probed at once, after a failure that may be its own."""
        instance.suspected.set()

    def missing(self) -> list[str]:
        problems = []
        for role, instances in self._roles.items():
            if not any(one.up for one in instances):
                troubles = "; ".join(f"{one.url} {one.trouble}" for one in instances)
                problems.append(f"no {role} instance answers: {troubles}")
            elif all(one.unfit or not one.up for one in instances):
                troubles = "; ".join(f"{one.url} {one.trouble or one.unfit}" for one in instances)
                problems.append(f"no {role} instance encodes: {troubles}")
        if not problems and not self.models().keys() & _names(self.encoders):
            served = "; ".join(f"{one.url} serves {', '.join(one.models)}" for one in self.instances if one.up)
            each = "an encode, a prefill and a decode" if self.decoders else "both an encode and a language"
            problems.append(f"no model is served by {each} instance: {served}")
        return problems

    def models(self) -> dict[str, dict[str, Any]]:
        """Returns the models in which texts are answered: for that, no encode instance is needed."""
        found = {name: model for one in self.languages if one.up for name, model in one.models.items()}
        decoded = _names(self.decoders) if self.decoders else found
        return {name: model for name, model in found.items() if name in decoded}

    def text_limits(self, model: str | None) -> LanguageSettings:
        """Returns the settings that bound the texts of a request, with the tokens that this model takes, if known."""
        served = [
            described for one in self.languages for name, described in one.models.items() if model in (None, name)
        ]
        found = [described.get("max_model_len") for described in served]
        tokens = max((one for one in found if isinstance(one, int) and one > 0), default=None)
        language = self.settings.language
        return language if tokens is None else language.model_copy(update={"max_prompt_tokens": tokens})

    def known(self) -> list[KnownWorker]:
        return [
            KnownWorker(
                one.url,
                one.role,
                one.url,
                tuple(one.models),
                one.up and not one.unfit,
                self.in_flight[one],
                trouble=one.trouble or one.unfit,
            )
            for one in self.instances
        ]

    def scraped(self) -> list[Scraped]:
        """Returns the pages of the instances, whose metrics are vLLM's own, and those of their connectors."""
        known = [(one.connector_metrics, one.url) for one in self.instances]
        return super().scraped() + [Scraped(page, "connector", url) for page, url in known if page is not None]

    async def pools(self) -> list[dict[str, Any]]:
        why = "instances of vLLM have no receive pool to ask for; see the metrics of their connectors (metrics_port)"
        raise ServeError("not_found", why)

    def counts(self) -> dict[str, int]:
        return {role: sum(one.up and not one.unfit for one in instances) for role, instances in self._roles.items()}

    async def _watch(self, instance: Instance) -> None:
        while instance in self.instances or instance.up:
            await self._probe(instance)
            instance.suspected.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(instance.suspected.wait(), self.settings.router.poll_interval)

    async def _probe(self, instance: Instance) -> None:
        if instance.probing.locked():
            async with instance.probing:  # wait for the probe that runs
                return
        async with instance.probing:
            try:
                await self._get(instance, "/health")
                self._set_models(instance, models_of(read_json(await self._get(instance, "/v1/models"))))
                if not instance.up:
                    self._set_up(instance)
                instance.is_stalled = False
            except httpx.TimeoutException as error:
                instance.set_stalled()
                self._set_down(instance, f"is silent: {type(error).__name__}")
            except DamagedError as error:
                self.damaged(instance, error)  # the next probe decides
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                self._set_down(instance, reason_of(error))

    async def _get(self, instance: Instance, path: str) -> bytes:
        """Returns the body of a probe's answer.

        Raises:
            httpx.HTTPError, httpx.InvalidURL: there is no answer, none in time, or one with another status than 200.
            DamagedError: it has arrived damaged.
        """
        router = self.settings.router
        timeout = httpx.Timeout(router.stall_timeout, connect=router.connect_timeout)
        request = self.control.build_request("GET", instance.url + path, headers=self._headers, timeout=timeout)
        response = await self._provers[instance].send(self.control, add_digests(request))
        try:
            if stream := response.extensions.get("network_stream"):
                self.own_addresses.add(stream.get_extra_info("server_addr")[0])
            body = await whole_body(response)
        finally:
            await response.aclose()
        if response.status_code != 200:
            raise httpx.HTTPError(f"{path} says {response.status_code}")
        return body

    def _set_models(self, instance: Instance, models: dict[str, dict[str, Any]]) -> None:
        """Notes what an instance serves: adapters (LoRA) come and go while it runs."""
        if instance.up and models.keys() != instance.models.keys():
            log.info("%r now serves %s", instance, ", ".join(models))
        instance.models = models

    def _set_up(self, instance: Instance) -> None:
        instance.up, instance.trouble, instance.unfit = True, "", ""
        instance.starts += 1
        instance.encoded.clear()
        log.info("%r answers and serves %s", instance, ", ".join(instance.models))
        self.journal.event("worker_found", worker=instance.url, role=instance.role)
        self._set_gauges()

    def _set_down(self, instance: Instance, why: str) -> None:
        if instance.up:
            log.warning("%r does not answer: %s", instance, why)
            self.journal.event("worker_lost", worker=instance.url, role=instance.role, reason=why)
        instance.up, instance.trouble = False, why
        self._set_gauges()

    def _set_gauges(self) -> None:
        for role, count in self.counts().items():
            self.metrics.set_workers(role, count)


def _names(instances: list[Instance]) -> set[str]:
    """Returns the names of all models that the running ones among these instances serve."""
    return {name for one in instances if one.up for name in one.models}


def _untried(instances: list[Instance], tried: Collection[Incarnation]) -> list[Instance]:
    counts = Counter(url for url, _ in tried)
    return [one for one in instances if one.incarnation not in tried and counts[one.url] < MAX_INCARNATIONS]
