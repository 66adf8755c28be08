"""Payloads, contestants and the plan of a run."""

from __future__ import annotations

import numpy as np
import pytest

from embferry.bench import content, contestants, sweeps
from embferry.bench.payloads import IMAGE, KNOWN, SMALL, TOKEN_BYTES, VIDEO, parse
from embferry.bench.plan import plan


def test_the_payloads_are_as_large_as_they_are_called() -> None:
    assert SMALL.size == 1 << 20
    assert IMAGE.size == 2040 * 4096 * 4 * 2
    assert round(VIDEO.size / 1e6) == 403


@pytest.mark.parametrize(
    ("text", "tokens"), [("1MiB", 32), ("67 mb", 2040), ("1GB", 30518), ("3 KiB", 1), ("65536", 2)]
)
def test_a_size_is_in_whole_tokens(text: str, tokens: int) -> None:
    assert parse(text).tokens == tokens
    assert parse(text).size == tokens * TOKEN_BYTES


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "1 TBs", "1e3", "1MB 2MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse(text)


def test_contestants_are_chosen_by_name_or_its_beginning_or_a_pattern() -> None:
    def keys(*patterns: str) -> list[str]:
        return [c.key for c in contestants.matching([*patterns])]

    assert keys("socket") == ["socket"]
    assert keys("tcp/verified") == ["tcp/verified/in-place", "tcp/verified/gathered"]
    assert keys("copy*", "copy") == ["copy/private", "copy/shared", "copy/fresh"]
    with pytest.raises(ValueError, match="nobody is called 'tc'"):
        keys("tc")


def test_a_missing_package_is_named_with_what_would_help() -> None:
    absent = contestants.Need(("no_such_engine", "nor_this"), "pip install it")
    reason = contestants.missing(contestants.Contestant("x", "x", "peer", "x:X", {}, absent))
    assert reason == "no_such_engine or nor_this is not installed: pip install it"
    assert contestants.missing(contestants.BY_KEY["socket"]) is None


def test_names_are_given_once() -> None:
    swept = [entry.contestant.key + entry.payload.name for points in sweeps.entries() for entry in points]
    assert len(set(swept)) == len(swept)
    assert len(contestants.BY_KEY) == len(contestants.ALL)


def test_everybody_who_is_no_variant_of_ours_is_always_there() -> None:
    others = {c.key for c in contestants.ALL if c.kind != "ours"}
    for payload in KNOWN:
        for quick in (True, False):
            planned = {entry.contestant.key for entry in plan(payload, None, None, quick=quick).entries}
            assert others < planned
            assert {
                f"{transport}/verified/in-place" for transport in ("shm", "tcp", "http", "mooncake", "nixl")
            } <= planned


def test_a_choice_is_kept() -> None:
    planned = plan(IMAGE, contestants.matching(["socket"]), 4, quick=False)
    assert [entry.contestant.key for entry in planned.entries] == ["socket"]
    assert planned.rounds == 4


def test_content_is_the_same_each_time_and_a_stamp_is_seen_across_fields() -> None:
    one, other = content.make(100_000), content.make(100_000)
    assert content.digest([one]) == content.digest([other[:40_000], other[40_000:]])
    content.stamp(one, 7)
    parts = [one[:40_000].reshape(-1, 8), one[40_000:].reshape(-1, 8)]
    assert content.is_stamped(parts, 7)
    assert not content.is_stamped(parts, 8)
    assert content.digest([one]) != content.digest([other])


@pytest.mark.parametrize("at", [0, 99_992])
def test_a_stamp_that_lacks_one_place_is_no_stamp(at: int) -> None:
    source = content.make(100_000)
    content.stamp(source, 3)
    assert content.is_stamped([source], 3)
    source[at : at + 8] = np.frombuffer((2).to_bytes(8), np.uint8)
    assert not content.is_stamped([source], 3)
