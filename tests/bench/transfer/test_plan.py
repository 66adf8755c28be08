"""Payloads, candidates and the plan of a run."""

from __future__ import annotations

import pytest

from embferry.bench.transfer import candidates, payloads
from embferry.bench.transfer.payloads import IMAGE, KNOWN, SMALL, TOKEN_BYTES, VIDEO, parse
from embferry.bench.transfer.plan import plan
from embferry.bench.transfer.sweeps import sweeps
from tests.bench.transfer.examples import BY_KEY


def test_the_known_payloads_have_the_size_in_their_name() -> None:
    assert SMALL.size == 1 << 20
    assert IMAGE.size == 2040 * 4096 * 4 * 2
    assert round(VIDEO.size / 1e6) == 403


@pytest.mark.parametrize(
    ("text", "tokens"), [("1MiB", 32), ("67 mb", 2040), ("1GB", 30518), ("3 KiB", 1), ("65536", 2)]
)
def test_a_size_is_rounded_to_whole_tokens(text: str, tokens: int) -> None:
    assert parse(text).tokens == tokens
    assert parse(text).size == tokens * TOKEN_BYTES


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "1 TBs", "1e3", "1MB 2MB"])
def test_text_that_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse(text)


def test_candidates_are_chosen_by_name_beginning_or_pattern() -> None:
    def keys(*patterns: str) -> list[str]:
        return [entry.candidate.key for batch in plan([SMALL], patterns) for entry in batch.entries]

    assert keys("socket") == ["socket"]
    trusted = [f"tcp/verified/in-place/{trust}" for trust in ("key", "tls")]
    assert keys("tcp/verified") == ["tcp/verified/in-place", "tcp/verified/gathered", *trusted]
    assert keys("copy*", "copy") == ["copy/private", "copy/shared", "copy/fresh"]
    assert keys("behind/tcp", "rooms") == ["rooms/shm/10", "rooms/shm/10000", "behind/tcp/0", "behind/tcp/1"]
    with pytest.raises(ValueError, match=r"'tc'.*copy/private.*pool"):
        keys("tc")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(candidates.NEEDS, "absent", (("no_such_engine", "nor_this"), "pip install it"))
    reason = candidates.missing(candidates.Candidate("x", "x", "peer", "x:X", {}, "absent"))
    assert reason == "no_such_engine or nor_this is not installed: pip install it"
    assert candidates.missing(BY_KEY["socket"]) is None


def test_names_are_unique() -> None:
    names = [entry.candidate.key + entry.result.payload.name for points in sweeps() for entry in points]
    assert len(set(names)) == len(names)
    assert len(BY_KEY) == len(candidates.ALL)


@pytest.mark.parametrize("quick", [True, False])
def test_every_payload_meets_every_transport_and_every_other_way(quick: bool) -> None:
    others = {c.key for c in candidates.ALL if c.kind != "ours"}
    for payload in KNOWN:
        (batch, *_) = plan([payload], quick=quick)
        planned = {entry.candidate.key for entry in batch.entries}
        assert others < planned
        assert {f"{name}/verified/in-place" for name in ("shm", "tcp", "http", "mooncake", "nixl")} <= planned


def test_chosen_candidates_and_rounds_replace_the_plan_and_its_sweeps() -> None:
    (batch,) = plan([IMAGE], ["socket"], rounds=4)
    assert [entry.candidate.key for entry in batch.entries] == ["socket"]
    assert batch.rounds == 4


def test_of_the_sweeps_a_quick_run_has_the_small_transfers_only_and_none_is_left_if_none_is_wanted() -> None:
    def swept(**options: bool) -> set[str]:
        return {entry.result.sweep for batch in plan([SMALL], **options) for entry in batch.entries} - {""}

    assert swept() == {"small", "rooms", "trust", "connect", "pool", "concurrency", "behind", "early"}
    assert swept(quick=True) == {"small"}
    assert swept(sweeps=False) == swept(quick=True, sweeps=False) == set()


def test_content_is_repeatable_and_differs_by_its_stamp() -> None:
    one, other = payloads.make(100_000), payloads.make(100_000)
    assert payloads.digest([one]) == payloads.digest([other[:40_000], other[40_000:]])
    payloads.stamp(one, 7)
    assert payloads.digest([one]) != payloads.digest([other])
