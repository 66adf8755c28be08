"""The connector's half in the scheduler: which requests wait, which may run, and which cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.v1.request import RequestStatus

from embferry.protocol.errors import EmbeddingTransferError, PeerGone, RemoteProtocolError

from .config import ConnectorConfig
from .consumer import Consumer
from .coordinates import KEY, REFUSED, coordinates_in, entry_in, refusal, wish_in
from .exposition import Exposition
from .failures import Failures
from .loads import Load, Loads
from .producer import Producer
from .router import Router
from .stats import Differences, Stats
from .tally import Tally

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.005
"""vLLM plans a step each millisecond while a request waits, and sends it to its workers though it is empty. That takes
a core from whoever the embedding is to come from, on the same machine; so an engine that has nothing to do waits here.
A request that comes meanwhile waits as long."""
ANSWERED = frozenset(
    {RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION}
)
"""How a request ends whose answer somebody reads."""


class StepMetadata(ECConnectorMetadata):  # type: ignore[misc]  # vLLM is not there where types are checked
    """From the scheduler to every worker, each step. ``publish``: what a producer's cache has and the scheduler not."""

    def __init__(self, loads: tuple[Load, ...] = (), publish: tuple[str, ...] = ()) -> None:
        self.loads = loads
        self.publish = publish


class SchedulerSide:
    """Made once an engine. Called from its loop only. Blocks it only when it has nothing to do, for ``IDLE_WAIT_S``."""

    def __init__(self, vllm_config: VllmConfig, config: ConnectorConfig, name: str, ranks: int) -> None:
        transfer, model = vllm_config.ec_transfer_config, vllm_config.model_config
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._hidden = model.get_inputs_embeds_size()
        self._metadata = PlaceholderMetadataResolver(model)
        for transport in config.make_transports():  # one that cannot be had ends the start, not a request
            transport.close()
        self.tally = Tally()
        port = config.metrics_port
        rank = vllm_config.parallel_config.data_parallel_rank
        self._exposition = None if port is None else Exposition(self.tally, config.host, port and port + rank)
        self._router = None if config.router is None else Router(config.router, config.failover_timeout)
        self._producer = Producer(config, name, self.tally) if transfer.is_ec_producer else None
        self._consumer = Consumer(config, self.tally, self._router, ranks) if transfer.is_ec_consumer else None
        self._encode_on_failure = config.encode_on_failure
        self._encoded_here: dict[str, set[str]] = {}  # by request: what could not be had
        self._failures = Failures(self._router, self.tally)
        self._loads = Loads()
        self._differences = Differences(self.tally)
        self._publish: set[str] = set()
        self._is_idle = False  # no token was planned in the last step, and no wait has been since

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        needed = [
            (index, feature)
            for index, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
        ]
        if self._producer is not None:
            self._publish |= self._producer.needs(request.request_id, (feature.identifier for _, feature in needed))
        if self._consumer is None:
            return True
        if request.request_id in self._failures:
            return False
        here = [self._can_run(request, index, feature) for index, feature in needed]  # all begin at once
        if not all(here) and self._is_idle and request.request_id not in self._failures:
            self._is_idle = False
            self._consumer.wait(IDLE_WAIT_S)
            here = [self._can_run(request, index, feature) for index, feature in needed]
        return all(here)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether workers are to load it instead of encoding it."""
        if self._consumer is not None and self._consumer.is_here(identifier):
            return True
        kept = None if self._producer is None else self._producer.shelf.find(identifier)
        return kept is not None and kept.shared.is_open

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        mm_hash = request.mm_features[index].identifier
        if self._consumer is not None and self._consumer.is_here(mm_hash):
            arrival = self._consumer.load(mm_hash)
            if arrival.shared is not None:
                self._loads.ask(mm_hash, arrival.shared, arrival.where.dtype, arrival.where.width)
        elif self._producer is not None and self.has_cache_item(mm_hash):
            kept = self._producer.shelf.find(mm_hash)
            if kept is not None:
                self._loads.ask(mm_hash, kept.shared, kept.item.dtype, kept.item.width)

    def build_connector_meta(self, freed: Iterable[str], tokens: int) -> StepMetadata:
        """``freed``: what vLLM's encoder cache has given up in this step; ``tokens``: how many are computed in it."""
        self._is_idle = tokens == 0
        meta = StepMetadata(self._loads.step(freed), tuple(self._publish))
        self._publish.clear()
        return meta

    def take_unavailable_requests(self) -> set[str]:
        return self._failures.take()

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """For the response's ``ec_transfer_params``: where each item can be fetched."""
        self._failures.forget(request.request_id)
        self._encoded_here.pop(request.request_id, None)
        if self._consumer is not None:
            self._consumer.finished(request.request_id)
        if self._producer is None or not request.mm_features:
            return None
        try:
            return self._offers(self._producer, request) if request.status in ANSWERED else None
        finally:
            self._producer.finished(request.request_id)

    def stats(self) -> Stats | None:
        """Since the last call."""
        return self._differences.take()

    def close(self) -> None:
        for part in (self._producer, self._consumer, self._router, self._exposition):
            if part is not None:
                part.close()
        self._producer = self._consumer = self._router = self._exposition = None

    def _offers(self, producer: Producer, request: Request) -> dict[str, Any]:
        items: dict[str, Any] = collect_ec_item_metadata(request.mm_features, self._metadata)
        for mm_hash, entry in items.items():
            try:
                wish = wish_in(request.ec_transfer_params)
                if wish is not None and len(items) > 1:
                    raise RemoteProtocolError("a room is for one item; ask for one item a request")
                entry[KEY] = producer.offer(mm_hash, None if wish is None else wish.room)
            except EmbeddingTransferError as error:  # whoever asked goes elsewhere; this engine goes on
                log.error("the embedding %s cannot be offered: %s", mm_hash, error)
                self.tally.add("items_refused", label=error.code)
                entry[REFUSED] = refusal(error)
        return items

    def _can_run(self, request: Request, index: int, feature: MultiModalFeatureSpec) -> bool:
        """Whether this item is no reason to wait. What cannot be had fails the request, or is encoded here."""
        here = self._encoded_here.get(request.request_id, ())
        if request.request_id in self._failures or feature.identifier in here:
            return True
        entry = None
        try:
            entry = entry_in(request.ec_transfer_params, feature.identifier)
            return self._is_here(request, index, feature, entry)
        except EmbeddingTransferError as error:
            self.tally.add("failures", label=error.code)
            if self._encode_on_failure and self._has_pixels(feature):
                log.warning("request %s: encoded here, for it cannot be had: %s", request.request_id, error)
                self.tally.add("encoded_here")
                self._encoded_here.setdefault(request.request_id, set()).add(feature.identifier)
                return True
            log.error("request %s fails: its embedding cannot be had: %s", request.request_id, error)
            self._failures.add(request.request_id, error, _token_in(entry))
            return False

    def _is_here(self, request: Request, index: int, feature: MultiModalFeatureSpec, entry: Any) -> bool:
        """Whether the item is here, or this engine can encode it itself because it has the pixels and nobody said
        where else it could be had."""
        assert self._consumer is not None
        where = coordinates_in(entry)
        if where is not None:
            where.check(request.get_num_encoder_embeds(index), self._dtype, self._hidden)
            return self._consumer.want(request.request_id, feature.identifier, where)
        if self._consumer.is_here(feature.identifier) or self._has_pixels(feature):
            return True
        raise PeerGone(
            f"nobody says where the embedding {feature.identifier} is, and the request has no image; encode it"
        )

    def _has_pixels(self, feature: MultiModalFeatureSpec) -> bool:
        if feature.data is None:
            return False
        return bool(set(feature.data.keys()) - self._metadata.fields_for(feature.modality))


def _token_in(entry: Any) -> str | None:
    """The router's token, also in coordinates that are otherwise malformed."""
    ours = entry.get(KEY) if isinstance(entry, dict) else None
    token = ours.get("replacement") if isinstance(ours, dict) else None
    return token if isinstance(token, str) else None
