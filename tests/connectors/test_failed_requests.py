"""Requests that fail: the router is told why before vLLM fails them."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from embferry import EmbeddingTransferError, PeerGone
from embferry.connectors.shared.counters import Counters
from embferry.connectors.vllm import router_client
from embferry.connectors.vllm.router_client import FailedRequests, RouterClient

from .pair import until

GONE = PeerGone("it is gone")


class ManualRouterClient(RouterClient):
    """Its reports are complete when the test says so."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, EmbeddingTransferError]] = []
        self.future: Future[None] = Future()

    def report_failure(self, token: str, error: EmbeddingTransferError) -> Future[None]:
        self.reports.append((token, error))
        return self.future


def test_a_request_fails_once_the_router_has_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_client, "REPORT_S", 3600.0)
    router, counters = ManualRouterClient(), Counters()
    failed = FailedRequests(router, counters)
    failed.add("r", GONE, "token")
    failed.add("r", GONE, "token")
    assert router.reports == [("token", GONE)]
    assert "r" in failed
    assert failed.take() == set()
    router.future.set_result(None)
    assert failed.take() == {"r"}
    assert failed.take() == set()
    assert "r" in failed, "vLLM has not finished it yet"
    failed.forget("r")
    assert "r" not in failed
    assert counters.read() == {("requests_failed", ""): 1}


def test_a_request_fails_although_the_router_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_client, "REPORT_S", 0.05)
    failed = FailedRequests(ManualRouterClient(), Counters())
    failed.add("r", GONE, "token")
    until(lambda: failed.take() == {"r"})


@pytest.mark.parametrize(("router", "token"), [(None, "token"), (ManualRouterClient(), None)])
def test_without_a_router_or_a_token_a_request_fails_at_once(router: RouterClient | None, token: str | None) -> None:
    failed = FailedRequests(router, Counters())
    failed.add("r", GONE, token)
    assert failed.take() == {"r"}


def test_a_request_that_has_finished_meanwhile_is_not_failed() -> None:
    failed = FailedRequests(None, Counters())
    failed.add("r", GONE, None)
    failed.forget("r")
    assert failed.take() == set()
