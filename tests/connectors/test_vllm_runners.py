"""Our hooks as vLLM's V1 and V2 runners call them, with the interleavings that its scheduler allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ports import free_port

from .pair import GUARD_S, until
from .runners import TOKENS, Request, Side, counted, encode, feature, fetched, loaded, output, vllm

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(600)]

Make = Callable[..., Side]


@pytest.fixture
def ready(make: Make) -> tuple[Side, Request]:
    """A consumer, and a request whose embedding has arrived."""
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer", cache_bytes=1)
    request = Request("r", feature("a"), params=params)
    fetched(consumer, request)
    return consumer, request


def test_an_embedding_is_copied_into_the_consumer_s_encoder_cache(ready: tuple[Side, Request]) -> None:
    consumer, request = ready
    loaded(consumer, request)
    consumer.run(consumer.plan())
    assert torch.equal(consumer.caches[0]["a"], output(ord("a")))


def test_a_load_is_repeated_after_a_step_without_tokens(ready: tuple[Side, Request], runner: str) -> None:
    consumer, request = ready
    loaded(consumer, request)
    consumer.run_empty(consumer.plan())
    assert ("a" in consumer.caches[0]) == (runner == "v2")
    consumer.run(consumer.plan())
    assert torch.equal(consumer.caches[0]["a"], output(ord("a")))
    assert consumer.plan().ec_connector_metadata.loads == ()


def test_a_load_in_overlapping_steps_is_done_once(ready: tuple[Side, Request]) -> None:
    """The second step is planned before the first has run; then the request ends, and the memory is closed."""
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


def test_a_request_may_be_aborted_after_its_step_was_planned(ready: tuple[Side, Request]) -> None:
    consumer, request = ready
    loaded(consumer, request)
    planned = consumer.plan()
    consumer.scheduler.request_finished(request)
    assert consumer.scheduler.has_cache_item("a")  # a worker is about to map it
    consumer.run(planned)
    assert "a" in consumer.caches[0]
    consumer.scheduler.request_finished(Request("another"))
    assert not consumer.scheduler.has_cache_item("a")


def test_an_embedding_that_vllm_evicted_is_not_loaded_again(ready: tuple[Side, Request]) -> None:
    """Its step had no effect, and vLLM needed its room in the next one."""
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


def test_a_preempted_request_loads_its_embedding_again(ready: tuple[Side, Request]) -> None:
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


def test_an_aborted_request_ends_its_transfer(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer")
    request = Request("r", feature("a"), params=params)
    assert not consumer.scheduler.ensure_cache_available(request, 0)
    request.status = vllm().status.FINISHED_ABORTED
    consumer.scheduler.request_finished(request)
    assert counted(consumer, "transfers", "aborted") + counted(consumer, "transfers", "success") == 1
    (manager,) = consumer.scheduler._scheduler._consumer._managers._managers.values()
    until(lambda: manager.allocator.available == 4)
    assert consumer.scheduler.take_unavailable_requests() == set()


def test_the_same_image_twice_is_one_transfer(make: Make) -> None:
    params = encode(make("ec_producer"), "a", "a")
    consumer = make("ec_consumer")
    fetched(consumer, Request("r", feature("a"), feature("a", TOKENS), params=params))
    assert counted(consumer, "transfers", "success") == 1


@pytest.mark.parametrize(("computed", "transfers"), [(TOKENS, 0), (TOKENS - 1, 1)])
def test_an_item_in_the_cached_prefix_is_not_fetched(make: Make, computed: int, transfers: int) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer")
    request = Request("r", feature("a"), params=params)
    until(lambda: consumer.scheduler.ensure_cache_available(request, computed))
    assert counted(consumer, "transfers", "success") == transfers


def test_an_embedding_that_only_the_scheduler_has_is_not_encoded_again(make: Make) -> None:
    producer = make("ec_producer")
    first = encode(producer, "a")["a"]["embferry"]
    producer.caches[0].clear()
    second = encode(producer, "a", request="again")["a"]["embferry"]
    assert second["digest"] == first["digest"]
    assert torch.equal(producer.caches[0]["a"], output(ord("a")))
    assert (counted(producer, "items_encoded"), counted(producer, "encodes_saved")) == (1, 1)


def test_an_embedding_that_only_vllm_has_is_published_again(make: Make) -> None:
    producer = make("ec_producer", cache_bytes=1, lease_timeout=0.1)
    encode(producer, "a")
    encode(producer, "b", request="another")
    half = producer.scheduler._scheduler._producer
    until(lambda: half.find("a") is None)
    answer = encode(producer, "a", request="again")
    assert answer["a"]["embferry"]["tokens"] == TOKENS
    assert (counted(producer, "items_encoded"), counted(producer, "encodes_saved")) == (2, 1)


def test_an_engine_of_both_roles_publishes_only_what_it_encodes(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    both = make("ec_both")
    request = Request("r", feature("a"), params=params)
    fetched(both, request)
    loaded(both, request)
    both.run(both.plan(), {"b": output(2)})
    assert set(both.caches[0]) == {"a", "b"}
    assert counted(both, "items_encoded") == 1


def test_a_request_may_name_the_room(make: Make) -> None:
    producer = make("ec_producer")
    assert encode(producer, "a", room=77)["a"]["embferry"]["room"] == 77
    refused = encode(producer, "b", "c", request="two", room=78)
    assert {entry["embferry_refused"]["code"] for entry in refused.values()} == {"remote_protocol_error"}
    refused = encode(producer, "d", request="wrong", room=-1)
    assert "malformed" in refused["d"]["embferry_refused"]["message"]


def test_an_aborted_request_offers_nothing(make: Make) -> None:
    producer = make("ec_producer")
    request = Request("r", feature("a"))
    producer.scheduler.ensure_cache_available(request, 0)
    producer.run(producer.plan(), {"a": output(1)})
    request.status = vllm().status.FINISHED_ABORTED
    assert producer.scheduler.request_finished(request) == (False, None)
    assert counted(producer, "items_offered") == 0


def test_each_answer_for_a_picture_is_the_same(make: Make) -> None:
    """Before and after it is fetched. Proxies refuse requests whose answers for one picture differ."""
    producer, consumer = make("ec_producer"), make("ec_consumer")
    first = encode(producer, "a")
    assert encode(producer, "a", request="again") == first
    fetched(consumer, Request("r", feature("a"), params=first))
    until(lambda: counted(producer, "offers_ended", "fetched") == 1)
    assert encode(producer, "a", request="later") == first
    other = make("ec_consumer")
    fetched(other, Request("s", feature("a"), params=first))


def test_an_idle_engine_waits_once_per_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    producer, consumer = make("ec_producer"), make("ec_consumer")
    params = encode(producer, "a")
    half, waits = consumer.scheduler._scheduler, []
    monkeypatch.setattr(half, "_is_available", lambda *_: False)
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


def test_an_arriving_embedding_ends_the_wait(make: Make) -> None:
    producer, consumer = make("ec_producer"), make("ec_consumer")
    asked = Request("asks", feature("a"), params=encode(producer, "a"))
    half = consumer.scheduler._scheduler
    assert not consumer.scheduler.ensure_cache_available(asked, 0)
    assert half._consumer.wait(GUARD_S)
    assert consumer.scheduler.ensure_cache_available(asked, 0)


def test_the_counters_reach_vllm_s_statistics(make: Make) -> None:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    producer = make("ec_producer")
    encode(producer, "a")
    stats = producer.scheduler.get_ec_connector_stats()
    assert isinstance(stats, vllm().stats)
    assert ("items_offered", "", 1) in stats.data["counts"]
    assert producer.scheduler.get_ec_connector_stats() is None, "nothing has changed"
    assert producer.workers[0].get_ec_connector_stats() is None
    kind = type(producer.scheduler)
    summed = kind.build_ec_connector_stats(stats.data).aggregate(vllm().stats({"counts": [("items_offered", "", 2)]}))
    assert summed.reduce()["items_offered"] == 3
    types = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    shown = kind.build_prom_metrics(producer.configs[0], types, ["engine", producer.runner], {0: ["0", "x"]})
    try:
        counts = [("items_offered", "", 2), ("failures", "peer_gone", 3)]
        shown.observe({"counts": counts, "seconds": [0.2]}, 0)
        labels = {"engine": "0", producer.runner: "x"}
        assert REGISTRY.get_sample_value("embferry_connector_items_offered_total", labels) == 2
        assert REGISTRY.get_sample_value("embferry_connector_failures_total", labels | {"code": "peer_gone"}) == 3
        assert REGISTRY.get_sample_value("embferry_connector_load_seconds_count", labels) == 1
    finally:
        for metric in (*shown._counters.values(), shown._seconds):
            REGISTRY.unregister(metric)


def test_ranks_on_two_hosts_load_what_each_host_has_received(make: Make) -> None:
    params = encode(make("ec_producer"), "a", "b")
    consumer = make("ec_consumer", ranks=2, hosts=2, transports=["shm", "tcp"], ranks_port=free_port())
    for name in "ab":
        request = Request(name, feature(name), params=params)
        fetched(consumer, request)
        loaded(consumer, request)
        consumer.run(consumer.plan())
        consumer.run(consumer.plan())  # an overlapping step repeats the load
        for cache in consumer.caches:
            assert torch.equal(cache[name], output(ord(name)))
        consumer.scheduler.request_finished(request)


def test_memory_on_the_other_host_is_freed_with_the_schedulers(make: Make) -> None:
    params = encode(make("ec_producer"), "a")
    consumer = make("ec_consumer", ranks=2, hosts=2, transports=["shm", "tcp"], ranks_port=free_port())
    request = Request("r", feature("a"), params=params)
    fetched(consumer, request)
    loaded(consumer, request)
    step = consumer.plan()
    consumer.run(step, ranks=[0])
    consumer.scheduler.request_finished(request)
    consumer.scheduler._scheduler._consumer._drop("a", "")
    later = consumer.plan(tokens=0), consumer.plan()
    assert later[0].ec_connector_metadata.dropped == later[1].ec_connector_metadata.dropped != ()
    for each in (step, later[1]):  # this rank is behind
        consumer.run(each, ranks=[1])
    assert torch.equal(consumer.caches[1]["a"], output(ord("a")))
    until(lambda: not consumer.workers[1]._worker._memory._mapped)
    assert consumer.plan().ec_connector_metadata.dropped == ()


def test_a_producer_on_two_hosts_loads_what_it_has_encoded_before(make: Make) -> None:
    producer = make("ec_producer", ranks=2, hosts=2, transports=["tcp"], ranks_port=free_port())
    encode(producer, "a", request="first")
    for cache in producer.caches:
        cache.clear()
    again = encode(producer, "a", request="second")
    assert "embferry" in again["a"]
    assert counted(producer, "encodes_saved") == 1
    for cache in producer.caches:
        assert torch.equal(cache["a"], output(ord("a")))
