"""The dispatcher: which encoder does which part, and who is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest

from embferry import PeerGone
from embferry.connectors.sglang.dispatcher import Dispatcher, Failure, Part
from embferry.connectors.sglang.parts import SOURCE_CODE, Source, decode_source, parse
from embferry.connectors.sglang.request_trace import RequestTrace
from embferry.traces.spans import Span, Tracer
from tests.traces.recorded import OUTER, client_span, facts, outline

from .both_sides import SETTINGS, WAIT_S
from .stub_encoders import Answer, HttpEncoder
from .test_transfer import until

pytestmark = pytest.mark.integration

SILENCE_S = 2.0
"""Time after which an encoder that is silent is lost: short, and no busy machine keeps one silent for as long."""


class Desk:
    """A dispatcher, and what it has told the schedulers."""

    def __init__(self, failover_timeout: float = 30.0) -> None:
        settings = msgspec.structs.replace(SETTINGS, encoder_timeout=SILENCE_S, failover_timeout=failover_timeout)
        self.dispatcher = Dispatcher(settings)
        self.told: list[Source] = []
        self.reached = threading.Event()
        self.reached.set()
        self._pool = ThreadPoolExecutor(8)

    def dispatch(
        self, encoders: list[HttpEncoder], *assigned: int, rid: str = "rid", trace: RequestTrace | None = None
    ) -> Future[Failure | None]:
        """Dispatches one part for each assigned encoder."""
        parts = [Part("IMAGE", number, {"mm_items": [f"picture {n}"]}) for n, number in enumerate(assigned)]
        urls = [encoder.url for encoder in encoders]
        return self._pool.submit(self.dispatcher.dispatch, rid, urls, parts, self._tell, self.reached, trace)

    def close(self) -> None:
        self.dispatcher.close()
        self._pool.shutdown()

    def _tell(self, text: str, code: int) -> None:
        assert code == SOURCE_CODE
        self.told.append(decode_source(text))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def encoders(stack: ExitStack) -> list[HttpEncoder]:
    return [stack.enter_context(HttpEncoder()) for _ in range(2)]


@pytest.fixture
def desk(stack: ExitStack, encoders: list[HttpEncoder]) -> Desk:
    made = Desk()
    stack.callback(made.close)
    return made


def test_each_part_goes_to_its_encoder_and_the_schedulers_are_told(desk: Desk, encoders: list[HttpEncoder]) -> None:
    assert desk.dispatch(encoders, 0, 1).result(WAIT_S) is None
    for number, encoder in enumerate(encoders):
        (body,) = encoder.encoded
        part = parse(body["req_id"])
        assert part is not None
        assert (part.rid, part.index, part.attempt) == ("rid", number, 0)
        assert (body["part_idx"], body["num_parts"], body["modality"]) == (number, 2, "IMAGE")
        assert body["mm_items"] == [f"picture {number}"]
        assert Source(part.name, number, 0, encoder.url, desk.told[0].info) in [
            msgspec.structs.replace(source, info=desk.told[0].info) for source in desk.told
        ]


def test_the_schedulers_are_told_once_they_know_the_request(desk: Desk, encoders: list[HttpEncoder]) -> None:
    desk.reached.clear()
    outcome = desk.dispatch(encoders, 0)
    until(lambda: bool(encoders[0].encoded))
    assert not desk.told
    desk.reached.set()
    assert outcome.result(WAIT_S) is None
    assert len(desk.told) == 1


def test_two_dispatches_have_different_names(desk: Desk, encoders: list[HttpEncoder]) -> None:
    for _ in range(2):
        desk.dispatch(encoders, 0).result(WAIT_S)
    first, second = (body["req_id"] for body in encoders[0].encoded)
    assert first != second


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_part_that_an_encoder_could_not_do_goes_to_another(
    desk: Desk, encoders: list[HttpEncoder], status: int
) -> None:

    def fail_once_it_is_told_of(body: dict[str, Any]) -> Answer:
        """An encoder that fails sooner than the schedulers know the request is not told of."""
        until(lambda: any(source.url == encoders[0].url for source in desk.told))
        return status, {"message": "no"}

    encoders[0].answer = fail_once_it_is_told_of
    assert desk.dispatch(encoders, 0, 1).result(WAIT_S) is None
    again = encoders[1].encoded[-1] if encoders[1].encoded[-1]["part_idx"] == 0 else encoders[1].encoded[0]
    part = parse(again["req_id"])
    assert part is not None
    assert (part.index, part.attempt) == (0, 1)
    assert [(source.url, source.attempt) for source in desk.told if source.index == 0] == [
        (encoders[0].url, 0),
        (encoders[1].url, 1),
    ]
    until(lambda: encoders[0].abandoned == [encoders[0].encoded[0]["req_id"]])


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_wrong_request_goes_to_one_encoder_only(desk: Desk, encoders: list[HttpEncoder], status: int) -> None:
    encoders[0].answer = lambda body: (status, {"message": "this is no picture"})
    failure = desk.dispatch(encoders, 0).result(WAIT_S)
    assert failure is not None
    assert failure.status == status
    assert "this is no picture" in failure.why
    assert not encoders[1].encoded


def test_every_encoder_is_asked_once_if_all_say_no(desk: Desk, encoders: list[HttpEncoder]) -> None:
    for encoder in encoders:
        encoder.answer = lambda body: (500, {"message": "out of memory"})
    failure = desk.dispatch(encoders, 1).result(WAIT_S)
    assert failure is not None
    assert (failure.status, [len(encoder.encoded) for encoder in encoders]) == (500, [1, 1])
    assert "out of memory" in failure.why


def test_an_encoder_that_is_gone_is_passed_over(desk: Desk, encoders: list[HttpEncoder]) -> None:
    encoders[0].close()
    assert desk.dispatch(encoders, 0).result(WAIT_S) is None
    assert len(encoders[1].encoded) == 1
    assert desk.dispatch(encoders, 0).result(WAIT_S) is None  # it was lost lately: the other one is asked first
    assert [source.attempt for source in desk.told] == [0, 0]  # only encoders that were asked count


def test_an_encoder_that_stands_still_while_it_encodes_is_passed_over(desk: Desk, encoders: list[HttpEncoder]) -> None:
    going_on = threading.Event()

    def stand_still(body: dict[str, Any]) -> Answer:
        encoders[0].stands_still()
        going_on.wait(WAIT_S)
        return 200, {}

    encoders[0].answer = stand_still
    try:
        assert desk.dispatch(encoders, 0).result(WAIT_S) is None
        assert len(encoders[1].encoded) == 1
    finally:
        going_on.set()


def test_an_encoder_that_is_only_busy_is_waited_for(desk: Desk, encoders: list[HttpEncoder]) -> None:
    """For three times as long as one that stands still."""
    encoders[0].answer = lambda body: (threading.Event().wait(3 * SILENCE_S), (200, {}))[1]
    assert desk.dispatch(encoders, 0).result(WAIT_S) is None
    assert not encoders[1].encoded


def test_an_encoder_that_does_not_say_what_it_is_is_passed_over(desk: Desk, encoders: list[HttpEncoder]) -> None:
    """A process that stands still takes connections, and answers nothing."""
    encoders[0].describes.clear()
    for _ in range(2):
        assert desk.dispatch(encoders, 0).result(WAIT_S) is None
    assert len(encoders[1].encoded) == 2
    encoders[0].describes.set()
    encoders[1].close()
    assert desk.dispatch(encoders, 0).result(WAIT_S) is None
    assert len(encoders[0].encoded) == 1


def test_without_another_encoder_one_that_says_nothing_fails_the_request(
    stack: ExitStack, encoders: list[HttpEncoder]
) -> None:
    encoders[0].describes.clear()
    desk = Desk(failover_timeout=0.5)
    stack.callback(desk.close)
    failure = desk.dispatch(encoders[:1], 0).result(WAIT_S)
    assert failure is not None
    assert failure.status == 503
    assert f"has not said what it is within {SILENCE_S:g} s" in failure.why


def test_an_id_that_is_too_long_for_a_name_is_refused(desk: Desk, encoders: list[HttpEncoder]) -> None:
    failure = desk.dispatch(encoders, 0, rid="r" * 513).result(WAIT_S)
    assert failure is not None
    assert failure.status == 400
    assert "at most 512 characters" in failure.why
    assert not encoders[0].encoded


def test_an_encoder_without_the_plugin_is_named(desk: Desk, encoders: list[HttpEncoder]) -> None:
    encoders[0].has_plugin = False
    failure = desk.dispatch(encoders[:1], 0).result(WAIT_S)
    assert failure is not None
    assert "start it with EMBFERRY_SGLANG=1" in failure.why
    assert not encoders[0].encoded


def test_an_encoder_of_another_kind_is_refused(desk: Desk, encoders: list[HttpEncoder]) -> None:
    part = Part("AUDIO", 0, {"mm_items": ["sound"]})
    failure = desk.dispatcher.dispatch("rid", [encoders[0].url], [part], desk._tell, desk.reached)
    assert failure is not None
    assert failure.status == 400
    assert "does not encode audios" in failure.why


def test_a_cancelled_request_is_abandoned(desk: Desk, encoders: list[HttpEncoder]) -> None:
    going_on = threading.Event()
    encoders[0].answer = lambda body: (going_on.wait(WAIT_S), (200, {}))[1]
    outcome, other = desk.dispatch(encoders, 0, rid="req-1"), desk.dispatch(encoders, 1, rid="req-10")
    until(lambda: len(encoders[0].encoded) == 1)
    desk.dispatcher.cancel("req-1")
    try:
        assert outcome.result(WAIT_S) is None
        assert other.result(WAIT_S) is None
        until(lambda: encoders[0].abandoned == [encoders[0].encoded[0]["req_id"]])
    finally:
        going_on.set()
    assert not encoders[1].abandoned


def test_a_request_that_is_cancelled_while_its_encoder_is_lost_goes_to_no_other(
    desk: Desk, encoders: list[HttpEncoder]
) -> None:
    going_on = threading.Event()
    encoders[0].answer = lambda body: (going_on.wait(WAIT_S), (200, {}))[1]
    outcome = desk.dispatch(encoders, 0)
    until(lambda: len(encoders[0].encoded) == 1)
    (lifeline,) = desk.dispatcher._encoders[encoders[0].url]._lifelines.values()

    def both_at_once() -> None:
        lifeline._set_lost(PeerGone("it is silent"))
        desk.dispatcher._cancel("rid")

    desk.dispatcher._loop.call_soon_threadsafe(both_at_once)
    try:
        assert outcome.result(WAIT_S) is None
        assert not encoders[1].encoded
    finally:
        going_on.set()


@contextmanager
def refused_by_one(encoders: list[HttpEncoder]) -> Iterator[None]:
    """The second encoder refuses its part while the first is at work at the other one."""
    going_on = threading.Event()

    def refuse(body: dict[str, Any]) -> Answer:
        until(lambda: bool(encoders[0].encoded))
        return 400, {"message": "this is no picture"}

    encoders[0].answer = lambda body: (going_on.wait(WAIT_S), (200, {}))[1]
    encoders[1].answer = refuse
    try:
        yield
    finally:
        going_on.set()


def test_a_failed_part_ends_the_others(desk: Desk, encoders: list[HttpEncoder]) -> None:
    with refused_by_one(encoders):
        failure = desk.dispatch(encoders, 0, 1).result(WAIT_S)
        assert failure is not None
        assert failure.status == 400
        until(lambda: encoders[0].abandoned == [encoders[0].encoded[0]["req_id"]])


def traced() -> tuple[list[Span], RequestTrace]:
    """Returns the list to which the spans of a request are added when they end, and what a dispatch is told of it."""
    seen: list[Span] = []
    return seen, RequestTrace(Tracer(seen.append), client_span())


def test_each_call_is_a_span_that_its_encoder_is_told_of(desk: Desk, encoders: list[HttpEncoder]) -> None:
    seen, trace = traced()
    assert desk.dispatch(encoders, 0, 1, trace=trace).result(WAIT_S) is None
    assert outline(seen, OUTER) == "encode encode"
    assert {span.kind for span in seen} == {"client"}
    for number, encoder in enumerate(encoders):
        (span,) = (span for span in seen if encoder.parents == [span.context.parent])
        assert facts(span.attributes) == {"worker": encoder.url, "part": number}


def test_without_a_trace_encoders_are_told_of_none(desk: Desk, encoders: list[HttpEncoder]) -> None:
    assert desk.dispatch(encoders, 0).result(WAIT_S) is None
    assert encoders[0].parents == [None]


def test_another_attempt_is_a_span_of_its_own(desk: Desk, encoders: list[HttpEncoder]) -> None:
    seen, trace = traced()
    encoders[0].answer = lambda body: (503, {"message": "no"})
    assert desk.dispatch(encoders, 0, trace=trace).result(WAIT_S) is None
    assert outline(seen, OUTER) == "encode:failed encode"


def test_a_call_that_is_of_no_use_has_an_error(desk: Desk, encoders: list[HttpEncoder]) -> None:
    """One part is refused, so the call for the other one is given up."""
    seen, trace = traced()
    with refused_by_one(encoders):
        assert desk.dispatch(encoders, 0, 1, trace=trace).result(WAIT_S) is not None
    errors = {facts(span.attributes)["worker"]: span.error for span in seen}
    assert errors == {encoders[0].url: "aborted", encoders[1].url: "refused"}


def test_an_encoder_that_is_lost_is_told_so(desk: Desk, encoders: list[HttpEncoder]) -> None:
    seen, trace = traced()

    def hang_up(body: dict[str, Any]) -> Answer:
        raise ConnectionAbortedError

    encoders[0].answer = hang_up
    assert desk.dispatch(encoders, 0, trace=trace).result(WAIT_S) is None
    assert outline(seen, OUTER) == "encode:lost encode"
