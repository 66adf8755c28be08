"""The connector's half in the scheduler: which requests wait, which may run, and which cannot."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata

from embferry.disaggregation.protocol.errors import EmbeddingTransferError, PeerGone

from .config import ConnectorConfig
from .consumer import Consumer
from .coordinates import KEY, coordinates_in
from .producer import Producer
from .shared import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


class Load(msgspec.Struct, frozen=True):
    """What a worker puts into its encoder cache in this step."""

    mm_hash: str
    place: Place
    dtype: str
    width: int


class StepMetadata(ECConnectorMetadata):  # type: ignore[misc]  # vLLM is not there where types are checked
    """From the scheduler to every worker, each step. ``publish``: what a producer's cache has and the scheduler not."""

    def __init__(self, loads: tuple[Load, ...] = (), publish: tuple[str, ...] = ()) -> None:
        self.loads = loads
        self.publish = publish


class SchedulerSide:
    """Made once an engine. Called from its loop only, and never blocks it."""

    def __init__(self, vllm_config: VllmConfig, config: ConnectorConfig, name: str) -> None:
        transfer, model = vllm_config.ec_transfer_config, vllm_config.model_config
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._hidden = model.get_inputs_embeds_size()
        self._metadata = PlaceholderMetadataResolver(model)
        for road in config.roads():  # one that cannot be had ends the start, not a request
            road.close()
        self._producer = Producer(config, name) if transfer.is_ec_producer else None
        self._consumer = Consumer(config) if transfer.is_ec_consumer else None
        self._loads: dict[str, Load] = {}
        self._publish: set[str] = set()
        self._unavailable: set[str] = set()
        self._failed: dict[str, EmbeddingTransferError] = {}  # by request, until it has finished

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        needed = [
            (index, feature)
            for index, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
        ]
        if self._producer is not None:
            found = {feature.identifier for _, feature in needed}
            self._publish |= {mm_hash for mm_hash in found if self._producer.shelf.find(mm_hash) is None}
        if self._consumer is None:
            return True
        if request.request_id in self._failed:
            return False
        try:
            here = [self._is_here(request, index, feature) for index, feature in needed]  # all begin at once
        except EmbeddingTransferError as error:
            log.error("request %s fails: its embedding cannot be had: %s", request.request_id, error)
            self._failed[request.request_id] = error
            self._unavailable.add(request.request_id)
            return False
        return all(here)

    def has_cache_item(self, identifier: str) -> bool:
        return self._consumer is not None and self._consumer.is_here(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        mm_hash = request.mm_features[index].identifier
        if self._consumer is not None and self._consumer.is_here(mm_hash):
            arrival = self._consumer.load(mm_hash)
            self._loads[mm_hash] = Load(mm_hash, arrival.place, arrival.where.dtype, arrival.where.width)

    def build_connector_meta(self) -> StepMetadata:
        meta = StepMetadata(tuple(self._loads.values()), tuple(self._publish))
        self._loads.clear()
        self._publish.clear()
        return meta

    def take_unavailable_requests(self) -> set[str]:
        taken, self._unavailable = self._unavailable, set()
        return taken

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """For the response's ``ec_transfer_params``: where each item can be fetched."""
        self._failed.pop(request.request_id, None)
        if self._consumer is not None:
            self._consumer.finished(request.request_id)
        if self._producer is None or not request.mm_features:
            return None
        items: dict[str, Any] = collect_ec_item_metadata(request.mm_features, self._metadata)
        for mm_hash, entry in items.items():
            try:
                offer = self._producer.offer(mm_hash)
            except EmbeddingTransferError as error:  # the consumer's request will fail, and say so; this engine goes on
                log.error("the embedding %s cannot be offered: %s", mm_hash, error)
                continue
            if offer is not None:
                entry[KEY] = offer
        return items

    def close(self) -> None:
        for side in (self._producer, self._consumer):
            if side is not None:
                side.close()
        self._producer = self._consumer = None

    def _is_here(self, request: Request, index: int, feature: MultiModalFeatureSpec) -> bool:
        """Whether the item is here, or this engine can encode it itself because it has the pixels and nobody said
        where else it could be had."""
        assert self._consumer is not None
        params = request.ec_transfer_params or {}
        where = coordinates_in(params.get(feature.identifier))
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
