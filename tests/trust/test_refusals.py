"""Log lines about strangers: which requests are theirs, and how many lines they can cause."""

from __future__ import annotations

import logging

import pytest

from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.occasions import REPORT_S
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.refusals import MAX_REASONS, Refusals
from embferry.trust.requests import SCHEME, Prover, Refused
from tests.clock import Clock

KEY, FOREIGN = Key.new(), Key.new()
TARGET = "/encode"


def test_each_reason_has_a_line_a_minute_and_counts_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refusals = Refusals("the server", clock=clock)
    for _ in range(3):
        for why in ("no key", "another key"):
            refusals.report("10.0.0.9", why)
    clock.now += REPORT_S
    refusals.report("10.0.0.8", "no key")
    assert caplog.messages == [
        "the server refused a connection of 10.0.0.9: no key",
        "the server refused a connection of 10.0.0.9: another key",
        "the server refused a connection of 10.0.0.8: no key (2 more since the last such line)",
    ]


def test_strangers_that_invent_reasons_cause_a_bounded_number_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refusals = Refusals("the server", clock=clock)
    for number in range(1000):
        refusals.report("10.0.0.9", f"reason {number}")
    assert len(caplog.messages) == MAX_REASONS + 1
    assert len(refusals._reasons._kinds) == MAX_REASONS + 1
    clock.now += REPORT_S
    refusals.report("10.0.0.9", "a new reason")
    assert "a new reason" in caplog.messages[-1]


def checked(caplog: pytest.LogCaptureFixture, method: str, *authorizations: str) -> list[str]:
    """Returns the lines that requests cause."""
    checker = ProofChecker(ClusterKeys(KEY), b"worker", "the worker")
    with caplog.at_level(logging.INFO):
        for authorization in authorizations:
            checker.check(method, TARGET, authorization, None, "10.0.0.9")
    return caplog.messages


def proof(key: Key, checker: ProofChecker) -> str:
    prover = Prover(lambda: key, b"worker")
    asked = checker.check("GET", TARGET, SCHEME, None, "10.0.0.1")
    assert isinstance(asked, Refused)
    prover.on_challenge(asked.challenge)
    return prover.prove("POST", TARGET).authorization


@pytest.mark.parametrize("authorization", ["", "Bearer x", SCHEME, f"{SCHEME} nonce=x"])
def test_a_request_without_a_proof_is_logged(caplog: pytest.LogCaptureFixture, authorization: str) -> None:
    lines = checked(caplog, "POST", *[authorization] * 3)
    assert lines == ["the worker refused a request of 10.0.0.9: it has no proof of the cluster key"]


def test_a_part_that_asks_for_a_nonce_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert not checked(caplog, "GET", SCHEME)


def test_a_replayed_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    checker = ProofChecker(ClusterKeys(KEY), b"worker", "the worker")
    recorded = proof(KEY, checker)
    for _ in range(3):
        checker.check("POST", TARGET, recorded, None, "10.0.0.9")
    assert caplog.messages == ["the worker refused a request of 10.0.0.9: a request with its proof has arrived before"]


def test_an_invented_proof_is_logged_whatever_its_nonce(caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = ProofChecker(ClusterKeys(FOREIGN), b"worker", "another")
    lines = checked(caplog, "POST", proof(FOREIGN, elsewhere))
    assert lines == ["the worker refused a request of 10.0.0.9: it was proved with a wrong cluster key"]


def test_a_part_that_does_not_know_of_a_restart_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    before = ProofChecker(ClusterKeys(KEY), b"worker", "the worker before")
    assert not checked(caplog, "POST", proof(KEY, before))
