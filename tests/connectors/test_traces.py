"""The span of a transfer to a consumer: under the request's, with resumes and losses as events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from embferry import EmbeddingReceiver, EmbeddingTransferError
from embferry.connectors.shared.transfer_trace import TransferTrace
from embferry.connectors.vllm.coordinates import Coordinates
from embferry.traces.spans import Span, Tracer
from tests.traces.recorded import client_span, facts

from .pair import CONFIG, NBYTES, NOTICES_LOSS_S, NOTICES_LOSS_SOON_S, TOKENS, Language, Pair, rows_like, until
from .routed import Routed

pytestmark = pytest.mark.integration

MakeRouted = Callable[..., Routed]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair(CONFIG)) as running:
        yield running


def traced(language: Language) -> list[Span]:
    """Returns the list to which the consumer adds its spans from now on."""
    seen: list[Span] = []
    language.consumer._tracer = Tracer(seen.append)
    return seen


def fetch(language: Language, coordinates: Coordinates, request: str = "r") -> None:
    until(lambda: language.consumer.require(request, "a", coordinates, client_span()))
    assert np.array_equal(language.rows("a"), rows_like(0))


def names(span: Span) -> list[str]:
    return [name for _, name, _ in span.events]


def test_a_transfer_is_a_span_of_the_request(pair: Pair) -> None:
    seen = traced(pair)
    pair.publish("a")
    fetch(pair, pair.offer("a"))
    (span,) = seen
    assert (span.name, span.parent, span.error) == ("transfer", client_span(), "")
    told = facts(span.attributes)
    resumed = int(told.pop("resumed"))
    assert told == {"tokens": TOKENS, "bytes": NBYTES, "transport": "shm"}
    assert resumed == pair.count("resumed_transfers") > 0
    assert set(names(span)) == {"first_tokens", "resumed"}
    numbers = [facts(more)["transfer"] for _, name, more in span.events if name == "resumed"]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 1 + resumed


def test_an_end_that_the_engine_sees_before_any_change_is_whole(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine polls, and the callback thread may not have run since the transfer began."""
    seen, changed = traced(pair), TransferTrace.changed
    late: list[Callable[[], None]] = []

    def later(trace: TransferTrace, receiver: EmbeddingReceiver, *, is_complete: bool) -> None:
        late.append(lambda: changed(trace, receiver, is_complete=is_complete))

    monkeypatch.setattr(TransferTrace, "changed", later)
    pair.publish("a")
    fetch(pair, pair.offer("a"))
    (span,) = seen
    before = list(span.events)
    assert names(span) == ["first_tokens", "resumed"]
    assert facts(before[-1][2])["transfer"] == 1 + pair.count("resumed_transfers")
    assert late
    for call in late:
        call()
    assert span.events == before


def test_two_threads_that_see_a_resume_tell_it_once_and_in_order() -> None:
    """The threads of the engine and of the callbacks: between what one reads and what it writes, the other waits."""
    seen: list[Span] = []
    trace = TransferTrace(Tracer(seen.append), client_span())

    class Receiver:
        verified_tokens, transport, count = 1, "tcp", 1

        @property
        def transfers(self) -> int:
            assert trace._lock.locked()
            return self.count

    receiver: Any = Receiver()
    for receiver.count in (2, 2, 3):
        trace.changed(receiver, is_complete=False)
    trace.end(receiver, 1)
    (span,) = seen
    assert names(span) == ["first_tokens", "resumed", "resumed"]
    assert [facts(more)["transfer"] for _, name, more in span.events if name == "resumed"] == [2, 3]


def test_an_embedding_that_is_here_needs_no_second_span(pair: Pair) -> None:
    seen = traced(pair)
    pair.publish("a")
    coordinates = pair.offer("a")
    fetch(pair, coordinates)
    fetch(pair, coordinates, "another")
    assert len(seen) == 1


def test_a_request_without_a_trace_has_no_span(pair: Pair) -> None:
    seen = traced(pair)
    pair.publish("a")
    pair.fetch("r", "a", pair.offer("a"))
    assert seen == []


def test_a_request_that_leaves_ends_the_span(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S, pause=1.0)
    seen = traced(routed.language)
    consumer = routed.language.consumer
    assert not consumer.require("r", "a", routed.dying_offer(), client_span())
    consumer.release("r")
    (span,) = seen
    assert span.error == "aborted"


def test_a_lost_producer_is_an_event(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    seen = traced(routed.language)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    fetch(routed.language, coordinates)
    (span,) = seen
    assert span.error == ""
    (lost,) = (more for _, name, more in span.events if name == "lost")
    assert facts(lost) == {"code": "peer_gone"}
    assert facts(span.attributes)["tokens"] == TOKENS


def test_a_transfer_that_fails_has_an_error(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_SOON_S)
    seen = traced(routed.language)
    coordinates = routed.dying_offer()
    with pytest.raises(EmbeddingTransferError):
        fetch(routed.language, coordinates)
    (span,) = seen
    assert (span.name, span.error) == ("transfer", "failed")
