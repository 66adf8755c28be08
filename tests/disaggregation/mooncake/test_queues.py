"""The queues of both sides over the origin's wire, whose handles have the methods of our own."""

from __future__ import annotations

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import EncodeManager, MooncakeEmbeddingBootstrapServer
from embferry.disaggregation.multimodal_embedding import (
    MultimodalEmbeddingBootstrapQueue,
    MultimodalEmbeddingInflightQueue,
)
from embferry.disaggregation.multimodal_language import (
    MultimodalLanguagePreallocQueue,
    MultimodalLanguageTransferQueue,
)
from embferry.protocol.settings import TransferSettings

from .builders import GEOMETRY, WAIT_S, equal, eventually, language_manager
from .engine_double import EngineNetwork
from .origin_peers import BLOCK, BLOCKS, embedding

pytestmark = pytest.mark.integration


def test_the_queues_of_both_sides_carry_requests_from_end_to_end(network: EngineNetwork) -> None:
    failed: list[object] = []
    transfer = TransferSettings(default_allocate_tokens=2 * BLOCK)
    with (
        MooncakeEmbeddingBootstrapServer() as bootstrap,
        EncodeManager(GEOMETRY, bootstrap_url=bootstrap.url, open_engine=network.open) as encode,
        language_manager(network, transfer=transfer) as language,
    ):
        announced = MultimodalEmbeddingBootstrapQueue(lambda request, error: failed.append(error))
        in_flight = MultimodalEmbeddingInflightQueue(lambda request, error: failed.append(error))
        waiting = MultimodalLanguagePreallocQueue(lambda request, error: failed.append(error))
        arriving = MultimodalLanguageTransferQueue(lambda request, error: failed.append(error))
        for room in range(1, 5):
            announced.add(room, encode.open(room), 10 * room, b"digest", (0, -room))
            waiting.add(room, language.open(room, bootstrap.url))
        whole, sent = [], []

        def done() -> bool:
            for request in announced.pop_bootstrapped():
                request.embedding_sender.send_embedding(embedding(10 * request.req, seed=request.req))
                in_flight.add(request)
            for request in waiting.pop_preallocated():
                arriving.add(request)
            whole.extend(arriving.pop_transferred())
            sent.extend(in_flight.pop_transferred())
            return len(whole) == len(sent) == 4

        eventually(done)
        assert failed == []
        for request in whole:
            assert equal(request.embedding_receiver.arrays(), embedding(10 * request.req, seed=request.req))
            assert list(request.embedding_receiver.aux[:3]) == [10 * request.req, -request.req, 0]
            assert request.transferred_tokens == request.total_embedding_length == 10 * request.req
            request.embedding_receiver.clear()
        assert language.allocator.available == BLOCKS


def test_two_ranks_of_a_language_side_resume_in_step(network: EngineNetwork) -> None:
    with (
        MooncakeEmbeddingBootstrapServer() as bootstrap,
        EncodeManager(GEOMETRY, bootstrap_url=bootstrap.url, open_engine=network.open) as encode,
        language_manager(network, tp_size=2, engine_rank=0) as first,
        language_manager(network, tp_size=2, engine_rank=1) as second,
    ):
        sender, rows = encode.open(1), embedding(20)
        sender.init()
        sender.send_embedding(rows)
        receivers = [manager.open(1, bootstrap.url) for manager in (first, second)]
        for receiver in receivers:
            receiver.init(receiver.manager.allocate(2 * BLOCK, 1))
        eventually(lambda: all(receiver.needs_resume for receiver in receivers))
        for receiver in receivers:
            assert receiver.resume_transfer(receiver.manager.allocate(BLOCK, 1), 2 * BLOCK) == 4
        for receiver in receivers:
            receiver.wait(WAIT_S)
            assert equal(receiver.arrays(), rows)
        sender.wait(WAIT_S)
