"""What a run reached of where it has to be."""

from __future__ import annotations

from embferry.bench.contestants import BY_KEY
from embferry.bench.payloads import SMALL
from embferry.bench.results import Measurement
from embferry.bench.targets import RATIOS, Reached, reached
from tests.bench import made


def line(words: str, *measurements: Measurement) -> Reached:
    found = [line for line in reached(made.results(*measurements)) if line.what.startswith(words)]
    assert len(found) >= 1, words
    return found[0]


def test_every_target_names_contestants_that_there_are() -> None:
    for ratio in RATIOS:
        assert set(ratio.against) <= set(BY_KEY)
        assert {f"{ratio.ours}/in-place", f"{ratio.ours}/gathered"} <= set(BY_KEY)


def test_nothing_measured_is_nothing_met() -> None:
    assert {line.verdict for line in reached(made.results())} == {"not measured"}


def test_a_ratio_is_of_goodputs_and_each_variant_is_judged() -> None:
    copy = made.measured("copy/private", 0.01)
    place = made.measured("shm/verified/in-place", 0.0125)
    gathered = made.measured("shm/verified/gathered", 0.02)
    found = line("shm, verified, 67 MB: goodput / memory copy", copy, place, gathered)
    assert found.values == {"in place": 0.8, "gathered": 0.5}
    assert found.verdict == "in place yes, gathered no"


def test_the_best_rival_counts() -> None:
    own = made.measured("tcp/verified/in-place", 0.01)
    slow, fast = made.measured("direct/mooncake", 0.04), made.measured("direct/mooncake-tuned", 0.02)
    found = line("tcp, verified, 67 MB: goodput / Mooncake", own, slow, fast)
    assert found.values == {"in place": 2.0}
    assert found.verdict == "yes"


def test_one_that_failed_is_no_rival() -> None:
    own, failed = made.measured("tcp/verified/in-place", 0.01), made.measured("direct/mooncake", 0.04)
    failed.status = "error"
    assert line("tcp, verified, 67 MB: goodput / Mooncake", own, failed).verdict == "not measured"


def test_times_of_transfers_are_compared_with_one() -> None:
    points = [made.point("transfers", "shm", n, made.sample(s)) for n, s in ((1, 1.0), (20, 1.04), (100, 1.2))]
    assert line("shm: time of 20", *points).verdict == "yes"
    assert line("shm: time of 100", *points).verdict == "no"
    assert line("tcp: time of 20", *points).verdict == "not measured"


def test_latency_has_to_be_below_every_other_that_crosses_processes() -> None:
    own = made.measured("shm/verified/in-place", 0.0009, payload=SMALL)
    limit, peer = (made.measured(key, 0.0005, payload=SMALL) for key in ("socket", "zeromq/copied"))
    assert line("shm, verified, 1 MiB: p50 in ms", own).verdict == "yes"
    assert line("shm, verified, 1 MiB: p50 / that", own, limit).verdict == "not measured"
    assert line("shm, verified, 1 MiB: p50 / that", own, limit, peer).verdict == "no"


def test_a_pool_counts_once_where_an_embedding_is_used_in_place() -> None:
    place, gathered = made.measured("shm/verified/in-place", 0.01), made.measured("shm/verified/gathered", 0.01)
    assert line("receiver's peak memory", gathered).values == {f"{gathered.label}, 67 MB": 1_000_000 / (1 << 20)}
    assert line("receiver's peak memory", gathered, place).values == {f"{place.label}, 67 MB": 5_000_000 / (1 << 20)}


def test_the_wire_is_that_of_the_worst_transport_and_of_large_payloads() -> None:
    good, bad = made.measured("shm/verified/in-place", 0.01), made.measured("tcp/verified/in-place", 0.01, wire=1.01)
    small = made.measured("shm/verified/in-place", 0.01, payload=SMALL, wire=1.5)
    assert line("bytes on the wire", good, small).verdict == "yes"
    assert line("bytes on the wire", good, bad).verdict == "no"
