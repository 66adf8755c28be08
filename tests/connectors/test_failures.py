"""Requests that fail: the router knows why before vLLM says that they have."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from embferry.connectors.vllm import failures as module
from embferry.connectors.vllm.failures import Failures
from embferry.connectors.vllm.router import Router
from embferry.connectors.vllm.tally import Tally
from embferry.protocol.errors import EmbeddingTransferError, PeerGone

from .pair import until

GONE = PeerGone("it is gone")


class Told(Router):
    """Takes things in when the test says so."""

    def __init__(self) -> None:
        self.said: list[tuple[str, EmbeddingTransferError]] = []
        self.future: Future[None] = Future()

    def failed(self, token: str, error: EmbeddingTransferError) -> Future[None]:
        self.said.append((token, error))
        return self.future


def test_it_fails_when_the_router_has_taken_it_in() -> None:
    router, tally = Told(), Tally()
    failures = Failures(router, tally)
    failures.add("r", GONE, "token")
    failures.add("r", GONE, "token")
    assert router.said == [("token", GONE)]
    assert "r" in failures
    assert failures.take() == set()
    router.future.set_result(None)
    assert failures.take() == {"r"}
    assert failures.take() == set()
    assert "r" in failures  # until vLLM has finished it
    failures.forget("r")
    assert "r" not in failures
    assert tally.read().counts == {("requests_failed", ""): 1}


def test_it_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_S", 0.05)
    failures = Failures(Told(), Tally())
    failures.add("r", GONE, "token")
    assert failures.take() == set()
    until(lambda: failures.take() == {"r"})


@pytest.mark.parametrize(("router", "token"), [(None, "token"), (Told(), None)])
def test_where_there_is_nobody_to_tell_it_fails_at_once(router: Router | None, token: str | None) -> None:
    failures = Failures(router, Tally())
    failures.add("r", GONE, token)
    assert failures.take() == {"r"}


def test_one_that_has_ended_meanwhile_is_not_failed() -> None:
    failures = Failures(None, Tally())
    failures.add("r", GONE, None)
    failures.forget("r")
    assert failures.take() == set()
