"""Our hooks as vLLM's V1 and V2 runners call them, and what its scheduler may do between two of their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .hooks import TOKENS, WIDTH, Request, Side, feature, vllm
from .pair import until

pytestmark = pytest.mark.vllm_more

Make = Callable[..., Side]


@pytest.fixture(params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make(runner: str) -> Iterator[Make]:
    made: list[Side] = []

    def new(role: str, ranks: int = 1, **extra: Any) -> Side:
        made.append(Side(runner, role, ranks, **extra))
        return made[-1]

    yield new
    for side in made:
        side.close()


def output(seed: int) -> Any:
    """As the encoder makes it."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def encode(side: Side, *names: str, request: str = "encode", wish: int | None = None) -> dict[str, Any]:
    """A request for these, from its first step to its answer."""
    params = None if wish is None else {"embferry": {"room": wish}}
    asked = Request(request, *(feature(name, at * TOKENS) for at, name in enumerate(names)), params=params)
    scheduler = side.scheduler
    assert scheduler.ensure_cache_available(asked, 0)
    new = {}
    for index, name in enumerate(dict.fromkeys(names)):
        if name in side.caches[0]:
            continue
        if not scheduler.has_cache_item(name):
            new[name] = output(sum(name.encode()))
        scheduler.update_state_after_alloc(asked, index)
    side.run(side.plan(), new)
    asked.status = vllm().status.FINISHED_LENGTH_CAPPED
    _, answer = scheduler.request_finished(asked)
    assert answer is not None
    return answer


def fetched(side: Side, request: Request) -> None:
    until(lambda: side.scheduler.ensure_cache_available(request, 0))


def counted(side: Side, name: str, label: str = "") -> float:
    half = side.scheduler._scheduler
    found: float = half.tally.read().counts.get((name, label), 0)
    return found


def loaded(side: Side, request: Request) -> None:
    """vLLM has made room for the request's item."""
    assert side.scheduler.has_cache_item(request.mm_features[0].identifier)
    side.scheduler.update_state_after_alloc(request, 0)


@pytest.fixture
def ready(make: Make) -> tuple[Side, Request]:
    """A consumer, and a request whose embedding is there."""
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer", cache_bytes=1)
    request = Request("r", feature("a"), params=params)
    fetched(consumer, request)
    return consumer, request


def test_from_one_encoder_cache_to_the_other(ready: tuple[Side, Request]) -> None:
    consumer, request = ready
    loaded(consumer, request)
    consumer.run(consumer.plan())
    assert torch.equal(consumer.caches[0]["a"], output(ord("a")))


def test_a_step_without_tokens_is_made_good(ready: tuple[Side, Request], runner: str) -> None:
    consumer, request = ready
    loaded(consumer, request)
    consumer.run_empty(consumer.plan())
    assert ("a" in consumer.caches[0]) == (runner == "v2")
    consumer.run(consumer.plan())
    assert torch.equal(consumer.caches[0]["a"], output(ord("a")))
    assert consumer.plan().ec_connector_metadata.loads == ()


def test_steps_overlap(ready: tuple[Side, Request]) -> None:
    """The second is planned before the first has run; then the request ends, and its memory is given up."""
    consumer, request = ready
    loaded(consumer, request)
    first, second = consumer.plan(), consumer.plan()
    assert second.ec_connector_metadata.loads == first.ec_connector_metadata.loads != ()
    consumer.run(first)
    consumer.scheduler.request_finished(request)
    assert not consumer.scheduler.has_cache_item("a")
    del consumer.caches[0]["a"]
    consumer.run(second)
    assert consumer.caches[0] == {}


def test_a_request_that_is_aborted_after_its_step_was_planned(ready: tuple[Side, Request]) -> None:
    consumer, request = ready
    loaded(consumer, request)
    planned = consumer.plan()
    consumer.scheduler.request_finished(request)
    assert consumer.scheduler.has_cache_item("a")  # a worker is about to map it
    consumer.run(planned)
    assert "a" in consumer.caches[0]
    consumer.scheduler.request_finished(Request("another"))
    assert not consumer.scheduler.has_cache_item("a")


def test_what_vllm_gives_up_does_not_come_back(ready: tuple[Side, Request]) -> None:
    """Its step came to nothing, and its place was needed in the next one."""
    consumer, request = ready
    loaded(consumer, request)
    consumer.plan()
    consumer.run(consumer.plan(freed=["a"]))
    assert consumer.caches[0] == {}
    assert consumer.plan().ec_connector_metadata.loads == ()


def test_every_rank_of_the_first_stage_copies(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer", ranks=2, cache_bytes=1)
    request = Request("r", feature("a"), params=params)
    fetched(consumer, request)
    loaded(consumer, request)
    consumer.run(consumer.plan(), ranks=[0])
    consumer.scheduler.request_finished(request)
    assert consumer.scheduler.has_cache_item("a")
    consumer.run_empty(consumer.plan(), rank=2)  # a later stage
    assert consumer.caches[2] == {}
    consumer.run(consumer.plan(), ranks=[1])
    for cache in consumer.caches[:2]:
        assert torch.equal(cache["a"], output(ord("a")))
    consumer.scheduler.request_finished(Request("another"))
    assert not consumer.scheduler.has_cache_item("a")


def test_a_request_that_is_preempted_finds_it_again(ready: tuple[Side, Request]) -> None:
    consumer, request = ready
    loaded(consumer, request)
    consumer.run(consumer.plan())
    assert consumer.scheduler.ensure_cache_available(request, TOKENS)
    consumer.run(consumer.plan(freed=["a"]))
    assert consumer.scheduler.ensure_cache_available(request, 0)
    loaded(consumer, request)
    consumer.run(consumer.plan())
    assert torch.equal(consumer.caches[0]["a"], output(ord("a")))
    assert counted(consumer, "transfers", "success") == 1


def test_a_request_that_is_aborted_while_it_loads(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer")
    request = Request("r", feature("a"), params=params)
    assert not consumer.scheduler.ensure_cache_available(request, 0)
    request.status = vllm().status.FINISHED_ABORTED
    consumer.scheduler.request_finished(request)
    assert counted(consumer, "transfers", "aborted") + counted(consumer, "transfers", "success") == 1
    (manager,) = consumer.scheduler._scheduler._consumer._managers.values()
    until(lambda: manager.allocator.available == 4)
    assert consumer.scheduler.take_unavailable_requests() == set()


def test_the_same_image_twice_is_one_transfer(make: Make) -> None:
    params = encode(make("ec_producer"), "a", "a")
    consumer = make("ec_consumer")
    fetched(consumer, Request("r", feature("a"), feature("a", TOKENS), params=params))
    assert counted(consumer, "transfers", "success") == 1


@pytest.mark.parametrize(("computed", "transfers"), [(TOKENS, 0), (TOKENS - 1, 1)])
def test_what_lies_in_the_cached_prefix_is_not_fetched(make: Make, computed: int, transfers: int) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer")
    request = Request("r", feature("a"), params=params)
    until(lambda: consumer.scheduler.ensure_cache_available(request, computed))
    assert counted(consumer, "transfers", "success") == transfers


def test_what_vllm_has_given_up_is_not_encoded_again(make: Make) -> None:
    producer = make("ec_producer")
    first = encode(producer, "a")["a"]["embferry"]
    producer.caches[0].clear()
    second = encode(producer, "a", request="again")["a"]["embferry"]
    assert second["digest"] == first["digest"]
    assert torch.equal(producer.caches[0]["a"], output(ord("a")))  # as vLLM believes
    assert (counted(producer, "items_encoded"), counted(producer, "encodes_saved")) == (1, 1)


def test_what_we_have_given_up_is_taken_from_vllm(make: Make) -> None:
    producer = make("ec_producer", cache_bytes=1, lease_timeout=0.1)
    encode(producer, "a")
    encode(producer, "b", request="another")
    half = producer.scheduler._scheduler._producer
    until(lambda: half.find("a") is None)
    answer = encode(producer, "a", request="again")
    assert answer["a"]["embferry"]["tokens"] == TOKENS
    assert (counted(producer, "items_encoded"), counted(producer, "encodes_saved")) == (2, 1)


def test_one_that_is_both_saves_only_what_it_encodes(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    both = make("ec_both")
    request = Request("r", feature("a"), params=params)
    fetched(both, request)
    loaded(both, request)
    both.run(both.plan(), {"b": output(2)})
    assert set(both.caches[0]) == {"a", "b"}
    assert counted(both, "items_encoded") == 1


def test_a_room_that_was_asked_for(make: Make) -> None:
    producer = make("ec_producer")
    assert encode(producer, "a", wish=77)["a"]["embferry"]["room"] == 77
    refused = encode(producer, "b", "c", request="two", wish=78)
    assert {entry["embferry_refused"]["code"] for entry in refused.values()} == {"remote_protocol_error"}
    refused = encode(producer, "d", request="wrong", wish=-1)
    assert "malformed" in refused["d"]["embferry_refused"]["message"]


def test_nothing_is_promised_to_nobody(make: Make) -> None:
    producer = make("ec_producer")
    request = Request("r", feature("a"))
    producer.scheduler.ensure_cache_available(request, 0)
    producer.run(producer.plan(), {"a": output(1)})
    request.status = vllm().status.FINISHED_ABORTED
    assert producer.scheduler.request_finished(request) == (False, None)
    assert counted(producer, "items_offered") == 0


def test_a_budget_that_is_full(make: Make) -> None:
    producer = make("ec_producer", offered_bytes=TOKENS * WIDTH * 4)
    assert "embferry" in encode(producer, "a")["a"]
    assert encode(producer, "b", request="s")["b"]["embferry_refused"]["code"] == "capacity_exhausted"
    assert counted(producer, "items_refused", "capacity_exhausted") == 1


@pytest.mark.parametrize("here", [False, True])
def test_what_cannot_be_had_fails_or_is_encoded_here(make: Make, here: bool) -> None:
    params = encode(make("ec_producer"), "a")
    params["a"]["embferry"]["room"] = 7
    consumer = make("ec_consumer", encode_on_failure=here)
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


def test_an_engine_without_work_waits_once_a_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    producer, consumer = make("ec_producer"), make("ec_consumer")
    params = encode(producer, "a")
    half, waits = consumer.scheduler._scheduler, []
    monkeypatch.setattr(half, "_is_here", lambda *_: False)
    monkeypatch.setattr(half._consumer, "wait", waits.append)
    asked = Request("asks", feature("a"), params=params)

    consumer.plan(tokens=1)
    assert not consumer.scheduler.ensure_cache_available(asked, 0)
    assert not waits
    for step in (1, 2):
        consumer.plan(tokens=0)
        for _ in range(3):
            assert not consumer.scheduler.ensure_cache_available(asked, 0)
        assert len(waits) == step


def test_the_wait_ends_when_an_embedding_is_here(make: Make) -> None:
    producer, consumer = make("ec_producer"), make("ec_consumer")
    asked = Request("asks", feature("a"), params=encode(producer, "a"))
    half = consumer.scheduler._scheduler
    assert not consumer.scheduler.ensure_cache_available(asked, 0)
    half._consumer.wait(30)
    assert consumer.scheduler.ensure_cache_available(asked, 0)


def test_parameters_that_are_no_table(make: Make) -> None:
    """vLLM takes them from ``vllm_xargs`` too, as whatever was written there."""
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


def test_without_pixels_it_cannot_be_encoded_here(make: Make) -> None:
    consumer = make("ec_consumer", encode_on_failure=True)
    assert not consumer.scheduler.ensure_cache_available(Request("r", feature("a")), 0)
    assert consumer.scheduler.take_unavailable_requests() == {"r"}


def test_numbers_through_vllm(make: Make) -> None:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    producer = make("ec_producer")
    encode(producer, "a")
    stats = producer.scheduler.get_ec_connector_stats()
    assert isinstance(stats, vllm().stats)
    assert stats.data["counts"]["items_offered"] == {"": 1}
    assert producer.scheduler.get_ec_connector_stats() is None  # nothing new
    assert producer.workers[0].get_ec_connector_stats() is None
    kind = type(producer.scheduler)
    summed = kind.build_ec_connector_stats(stats.data).aggregate(vllm().stats({"counts": {"items_offered": {"": 2}}}))
    assert summed.reduce()["items_offered"] == 3
    types = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    shown = kind.build_prom_metrics(producer.configs[0], types, ["engine", producer.runner], {0: ["0", "x"]})
    try:
        shown.observe({"counts": {"items_offered": {"": 2}, "failures": {"peer_gone": 3}}, "seconds": [0.2]}, 0)
        labels = {"engine": "0", producer.runner: "x"}
        assert REGISTRY.get_sample_value("embferry_ec_items_offered_total", labels) == 2
        assert REGISTRY.get_sample_value("embferry_ec_failures_total", labels | {"code": "peer_gone"}) == 3
        assert REGISTRY.get_sample_value("embferry_ec_seconds_count", labels) == 1
    finally:
        for metric in (*shown._counters.values(), shown._seconds):
            REGISTRY.unregister(metric)
