"""The connector's half in the scheduler: decides which requests wait, which can run, and which fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.v1.request import RequestStatus

from embferry import EmbeddingTransferError, PeerGone, RemoteProtocolError
from embferry.models import grid_rule
from embferry.traces.context import TraceContext, parse
from embferry.traces.otlp import open_tracer
from embferry.transfer.failures import as_transfer_error, attempt

from ..shared.counters import Counters, MetricsServer
from ..shared.shared_rows import SharedRows
from .config import ConnectorConfig
from .consumer import Consumer
from .coordinates import (
    KEY,
    REFUSED,
    coordinates_in,
    entry_in,
    failover_token_in,
    refusal_in,
    room_request_in,
)
from .engine_input import has_input
from .other_hosts import Dropped, OtherHosts
from .pending_loads import PendingLoad, PendingLoads
from .placement import Placement
from .producer import Producer
from .router_client import FailedRequests, RouterClient
from .shared_cache import open_cache
from .workers import Workers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.005
"""While a request waits, vLLM plans a step each millisecond and sends it to its workers although it is empty. On one
machine that takes a core from the producer. So an engine that has nothing else to do waits here for an embedding; a
request that arrives meanwhile waits as long."""
ENCODE_WAIT_S = 0.25
"""The same while what is waited for is still being encoded, which takes longer and needs the cores more. Here a request
that arrives ends the wait, if the engine lets that be seen."""
ANSWERED = frozenset(
    {RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION}
)
"""Final states of requests whose response is delivered."""


@dataclass
class StepMetadata(ECConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Message from the scheduler to every worker in each step.

    Attributes:
        loads: Embeddings to copy into the encoder cache.
        publish: Hashes that a producer's worker is to publish if its encoder cache has them.
        contents: Keys in the cache that encoders share of what the step encodes, by hash.
        dropped: Memory on other hosts that is needed no longer.
    """

    loads: tuple[PendingLoad, ...]
    publish: tuple[str, ...]
    contents: dict[str, str] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()


class SchedulerSide:
    """One in each engine. The engine's loop calls the methods, which block for at most :data:`ENCODE_WAIT_S`."""

    def __init__(self, vllm_config: VllmConfig, config: ConnectorConfig, name: str, placement: Placement) -> None:
        setting = "ec_connector_extra_config: traces_endpoint"
        self._tracer = open_tracer(config.traces_endpoint, "embferry-connector", setting=setting)
        transfer, model = vllm_config.ec_transfer_config, vllm_config.model_config
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._hidden = model.get_inputs_embeds_size()
        self._metadata = PlaceholderMetadataResolver(model)
        self._model = model
        for transport in config.make_transports():  # a transport that is not available fails the start, not a request
            transport.close()
        self.counters = Counters()
        port, rank = config.metrics_port, vllm_config.parallel_config.data_parallel_rank
        self._metrics = None if port is None else MetricsServer(self.counters, config.host, port and port + rank)
        self._router = None if config.router is None else RouterClient(config.router, config.failover_timeout)
        ranks, hosts, others = placement.ranks_here, placement.hosts, None
        if hosts > 1:
            others = OtherHosts(config, hosts, self._hidden, self._dtype, self.counters)
        self._workers = Workers(name, ranks, others)
        producing, consuming = transfer.is_ec_producer, transfer.is_ec_consumer
        self._producer = Producer(config, self._workers, self.counters) if producing else None
        self._consumer = (
            Consumer(config, self.counters, self._router, self._workers, self._tracer) if consuming else None
        )
        self._shared = (
            None if self._producer is None else open_cache(config, vllm_config, self._producer, self.counters, ranks)
        )
        self._contents: dict[str, str] = {}
        self._encode_on_failure = config.encode_on_failure
        self._encoded_here: dict[str, set[str]] = {}  # hashes that could not be obtained, by request
        self.failed = FailedRequests(self._router, self.counters)
        self._loads = PendingLoads()
        self._publish: set[str] = set()
        self._has_input = has_input()
        self._is_idle = False  # the last step had no tokens, and ensure_cache_available() has not waited since

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Returns whether every embedding that the request needs beyond its computed tokens is here."""
        needed = [
            (index, feature)
            for index, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
        ]
        if self._producer is not None:
            hashes = [feature.identifier for _, feature in needed]
            self._publish |= self._producer.hold(request.request_id, hashes, _room(request))
            if self._waits_for_shared_cache(self._producer, request, needed):
                return False
            if self._producer.is_mapping(request.request_id):
                return False
        if self._consumer is None:
            return True
        if request.request_id in self.failed:
            return False
        ready = [self._can_run(request, index, feature) for index, feature in needed]  # starts all transfers at once
        if not all(ready) and self._is_idle and request.request_id not in self.failed:
            self._is_idle = False
            self._wait(self._consumer)
            ready = [self._can_run(request, index, feature) for index, feature in needed]
        return all(ready)

    def _wait(self, consumer: Consumer) -> None:
        """Waits for an embedding while the engine has nothing else to do."""
        if self._has_input is None or not consumer.only_awaits:
            consumer.wait(IDLE_WAIT_S)
            return
        until = time.monotonic() + ENCODE_WAIT_S
        while not consumer.wait(IDLE_WAIT_S) and not self._has_input() and time.monotonic() < until:
            if self.failed.are_reported:
                return

    def find(self, mm_hash: str) -> SharedRows | None:
        """Returns the memory from which workers can load an embedding instead of encoding it, if it is here."""
        rows = None if self._consumer is None else self._consumer.find(mm_hash)
        if rows is None and self._producer is not None and (cached := self._producer.cache.find(mm_hash)) is not None:
            rows = cached.shared
        return rows if rows is not None and rows.is_open and self._can_load(rows) else None

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Asks the workers to load an embedding for which vLLM has reserved room."""
        mm_hash = request.mm_features[index].identifier
        rows = self.find(mm_hash)
        if rows is not None:
            self._loads.add(mm_hash, rows, self._workers.rooms(rows))
        elif self._shared is not None:
            self._contents[mm_hash] = self._shared.key(request.request_id, mm_hash)

    def build_connector_meta(self, freed: Iterable[str], tokens: int) -> StepMetadata:
        """Returns the message for a step that computes ``tokens`` and evicts ``freed`` from vLLM's encoder cache."""
        self._is_idle = tokens == 0
        dropped = self._workers.dropped(repeat=self._is_idle)
        meta = StepMetadata(self._loads.for_step(freed), tuple(self._publish), self._contents, dropped)
        self._publish.clear()
        self._contents = {}
        return meta

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """Returns the response's ``ec_transfer_params``: where each item can be fetched."""
        self.failed.forget(request.request_id)
        self._encoded_here.pop(request.request_id, None)
        if self._shared is not None:
            self._shared.forget(request.request_id, (feature.identifier for feature in request.mm_features))
        if self._consumer is not None:
            self._consumer.release(request.request_id)
        if self._producer is None or not request.mm_features:
            return None
        try:
            return self._offers(self._producer, request) if request.status in ANSWERED else None
        finally:
            self._producer.release(request.request_id)

    def close(self) -> None:
        engine = (self._shared, self._producer, self._consumer, self._workers)
        for part in (*engine, self._router, self._metrics, self._tracer):
            if part is not None and (error := attempt(part.close)) is not None:
                log.error("a part of the connector could not be closed", exc_info=error)
        self._shared = self._producer = self._consumer = self._router = self._metrics = None

    def _waits_for_shared_cache(
        self, producer: Producer, request: Request, needed: list[tuple[int, MultiModalFeatureSpec]]
    ) -> bool:
        """Returns whether an item of the request is being looked up in the cache that encoders share."""
        if self._shared is None:
            return False
        items = self._shared.items(request, needed)
        waits = self._shared.is_searching(request.request_id, items, producer.find)
        if waits and self._is_idle:
            self._is_idle = False
            self._shared.wait(IDLE_WAIT_S)
            waits = self._shared.is_searching(request.request_id, items, producer.find)
        return waits

    def _offers(self, producer: Producer, request: Request) -> dict[str, Any]:
        items: dict[str, Any] = collect_ec_item_metadata(request.mm_features, self._metadata)
        for mm_hash, entry in items.items():
            try:
                requested = room_request_in(request.ec_transfer_params)
                if requested is not None and len(items) > 1:
                    raise RemoteProtocolError("a room is for one item; ask for one item per request")
                entry[KEY] = producer.offer(mm_hash, None if requested is None else requested.room)
                if self._picture_rule is not None:
                    entry[grid_rule.KEY] = self._picture_rule
            except Exception as raised:  # noqa: BLE001  (the router tries another producer; this engine continues)
                error = as_transfer_error("offering the embedding", raised)
                log.error("the embedding %s cannot be offered: %s", mm_hash, error)
                self.counters.add("items_refused", label=error.code)
                entry[REFUSED] = {"code": error.code, "message": error.detail}
        return items

    @cached_property
    def _picture_rule(self) -> dict[str, Any] | None:
        """How the model's processor makes grids of pictures, if that is known."""
        try:
            from .picture_rule import picture_rule  # brings vLLM's models with it

            rule = picture_rule(self._model)
        except Exception:  # a processor of another kind; the router asks consumers later then
            log.info("it is not known how the processor makes grids of pictures", exc_info=True)
            return None
        return None if rule is None else msgspec.to_builtins(rule)

    def _can_run(self, request: Request, index: int, feature: MultiModalFeatureSpec) -> bool:
        """Returns whether the request need not wait for this item.

        An item that cannot be obtained fails the request, or is encoded by this engine.
        """
        encoded_here = self._encoded_here.get(request.request_id, ())
        if request.request_id in self.failed or feature.identifier in encoded_here:
            return True
        entry = None
        try:
            entry = entry_in(request.ec_transfer_params, feature.identifier)
            return self._is_available(request, index, feature, entry)
        except Exception as raised:  # a bug, or no memory: fails this request alone
            error = as_transfer_error("obtaining the embedding", raised)
            if error is not raised:
                log.error("obtaining an embedding raised", exc_info=raised)
            self.counters.add("failures", label=error.code)
            if self._encode_on_failure and self._has_pixels(feature):
                log.warning("request %s: encodes its item here, cannot obtain it: %s", request.request_id, error)
                self.counters.add("encoded_here")
                self._encoded_here.setdefault(request.request_id, set()).add(feature.identifier)
                return True
            log.error("request %s fails, cannot obtain its embedding: %s", request.request_id, error)
            self.failed.add(request.request_id, error, failover_token_in(entry))
            return False

    def _is_available(self, request: Request, index: int, feature: MultiModalFeatureSpec, entry: Any) -> bool:
        """Returns whether the item is here, or has pixels and no coordinates, so that this engine encodes it."""
        assert self._consumer is not None
        coordinates = coordinates_in(entry)
        if coordinates is not None:
            coordinates = coordinates.at_prompt(request.get_num_encoder_embeds(index), self._dtype, self._hidden)
            call = None if self._tracer is None else _call_in(request)
            return self._consumer.require(request.request_id, feature.identifier, coordinates, call)
        if self._consumer.find(feature.identifier) is not None:
            return True
        if (refusal := refusal_in(entry)) is not None:
            raise refusal
        if self._has_pixels(feature):
            return True
        raise PeerGone(f"the request has neither coordinates nor the image of {feature.identifier}; encode it first")

    def _can_load(self, rows: SharedRows) -> bool:
        try:
            return self._workers.is_mapped(rows)
        except EmbeddingTransferError:
            return False

    def _has_pixels(self, feature: MultiModalFeatureSpec) -> bool:
        if feature.data is None:
            return False
        return bool(set(feature.data.keys()) - self._metadata.fields_for(feature.modality))


def _room(request: Request) -> int | None:
    """Returns the room in which the one item of an encode request is to be offered; None if it names none."""
    try:
        requested = room_request_in(request.ec_transfer_params)
    except RemoteProtocolError:  # the response has it
        return None
    return None if requested is None or len(request.mm_features) > 1 else requested.room


def _call_in(request: Request) -> TraceContext | None:
    """Returns the span that the HTTP request named, if its trace is recorded. vLLM keeps the headers if it traces."""
    headers = getattr(request, "trace_headers", None) or {}
    call = parse(headers.get("traceparent", ""), headers.get("tracestate", ""))
    return call if call is not None and call.sampled else None
