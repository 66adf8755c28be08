"""Items that cannot be offered or obtained, as vLLM's V1 and V2 runners see it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .pair import until
from .runners import TOKENS, WIDTH, Request, Side, config, counted, encode, feature, fetched, loaded, output, vllm

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(600)]

Make = Callable[..., Side]


def test_an_offer_beyond_the_budget_is_refused(make: Make) -> None:
    producer = make("ec_producer", offered_bytes=TOKENS * WIDTH * 4)
    assert "embferry" in encode(producer, "a")["a"]
    assert encode(producer, "b", request="s")["b"]["embferry_refused"]["code"] == "capacity_exhausted"
    assert counted(producer, "items_refused", "capacity_exhausted") == 1


@pytest.mark.parametrize(
    ("settings", "here"), [({}, True), ({"encode_on_failure": True}, True), ({"encode_on_failure": False}, False)]
)
def test_an_embedding_that_cannot_be_obtained_is_encoded_here_unless_that_is_off(
    make: Make, settings: dict[str, bool], here: bool
) -> None:
    params = encode(make("ec_producer"), "a")
    params["a"]["embferry"]["room"] = 7
    consumer = make("ec_consumer", **settings)
    request = Request("r", feature("a", pixels=True), params=params)
    taken: set[str] = set()

    def decided() -> bool:
        available: bool = consumer.scheduler.ensure_cache_available(request, 0)
        taken.update(consumer.scheduler.take_unavailable_requests())
        return available or bool(taken)

    until(decided)
    assert taken == (set() if here else {"r"})
    assert not consumer.scheduler.has_cache_item("a")
    assert counted(consumer, "failures", "peer_gone") == 1
    assert counted(consumer, "encoded_here") == int(here)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_an_embedding_that_is_not_offered_is_encoded_here_or_fails(make: Make, here: bool, pixels: bool) -> None:
    producer = make("ec_producer", offered_bytes=1)
    params = encode(producer, "a")
    assert "embferry_refused" in params["a"]
    consumer = make("ec_consumer", encode_on_failure=here)
    request = Request("r", feature("a", pixels=pixels), params=params)
    is_encoded = here and pixels
    assert consumer.scheduler.ensure_cache_available(request, 0) == is_encoded
    assert consumer.scheduler.take_unavailable_requests() == (set() if is_encoded else {"r"})
    assert counted(consumer, "failures", "capacity_exhausted") == 1
    assert counted(consumer, "encoded_here") == int(is_encoded)


def test_memory_that_a_rank_cannot_map_fails_the_request_and_not_the_worker(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer", ranks=2)
    memory = consumer.workers[1]._worker._memory
    mapped = memory._map

    def exhausted(packet: Any, fd: int) -> None:
        os.close(fd)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    memory._map = exhausted
    request = Request("r", feature("a"), params=params)
    taken: set[str] = set()

    def has_failed() -> bool:
        assert not consumer.scheduler.ensure_cache_available(request, 0)
        taken.update(consumer.scheduler.take_unavailable_requests())
        return bool(taken)

    until(has_failed)
    consumer.run(consumer.plan())
    assert consumer.caches[0] == {}
    assert counted(consumer, "failures", "transport_error") == 1
    consumer.scheduler.request_finished(request)
    memory._map = mapped
    again = Request("s", feature("b"), params=encode(make("ec_producer"), "b"))
    fetched(consumer, again)
    loaded(consumer, again)
    consumer.run(consumer.plan())
    assert torch.equal(consumer.caches[1]["b"], output(ord("b")))


def test_an_error_that_no_one_expects_fails_the_request_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer")
    half = consumer.scheduler._scheduler
    monkeypatch.setattr(half._consumer, "require", lambda *_: [][0])
    assert not consumer.scheduler.ensure_cache_available(Request("r", feature("a"), params=params), 0)
    assert consumer.scheduler.take_unavailable_requests() == {"r"}
    monkeypatch.undo()
    fetched(consumer, Request("s", feature("a"), params=params))


def test_parameters_that_are_not_an_object_are_refused(make: Make) -> None:
    """Users can set them in ``vllm_xargs``, which vLLM does not validate."""
    consumer, producer = make("ec_consumer"), make("ec_producer")
    asked = Request("odd", feature("a"), params="embferry")  # type: ignore[arg-type]
    assert not consumer.scheduler.ensure_cache_available(asked, 0)
    until(lambda: consumer.scheduler.take_unavailable_requests() == {"odd"})
    encode(producer, "a")
    odd = Request("odd", feature("a"), params="embferry")  # type: ignore[arg-type]
    odd.status = vllm().status.FINISHED_LENGTH_CAPPED
    _, answer = producer.scheduler.request_finished(odd)
    assert answer is not None
    assert answer["a"]["embferry_refused"]["code"] == "remote_protocol_error"


def test_a_request_without_pixels_fails_although_failures_are_encoded(make: Make) -> None:
    consumer = make("ec_consumer")
    assert not consumer.scheduler.ensure_cache_available(Request("r", feature("a")), 0)
    assert consumer.scheduler.take_unavailable_requests() == {"r"}


def test_an_encode_instance_has_one_pipeline_stage() -> None:
    """With vLLM 0.32 the others would wait for ever for what the first stage sends."""
    staged = config("ec_producer", 0, 1, "staged")
    staged.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match="pipeline_parallel_size is 2"):
        vllm().connector(staged, vllm().role.SCHEDULER)
