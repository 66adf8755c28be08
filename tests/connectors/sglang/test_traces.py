"""The spans of both sides of a transfer, under the request's: resumes and losses are events, without SGLang."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from embferry import EmbeddingTransferError, KVPoll
from embferry.connectors.sglang.incoming import IncomingPart
from embferry.connectors.sglang.outgoing import OutgoingPart
from embferry.connectors.sglang.request_trace import RequestTrace, context_of
from embferry.traces.spans import Span, Tracer
from embferry.transfer.handle import ENDED
from tests.traces.recorded import MALFORMED, OUTER, PARENT, client_span, facts, is_nested, outline

from .both_sides import SHAPE, TOKENS, WAIT_S, StubEncoder, both_sides, wait_complete
from .test_transfer import MIDDLE, receiver_of, stop_in_the_middle, until

pytestmark = pytest.mark.integration


@pytest.fixture
def seen() -> list[Span]:
    """The spans that have ended."""
    return []


@pytest.fixture
def trace(seen: list[Span]) -> RequestTrace:
    """The trace of the request."""
    return RequestTrace(Tracer(seen.append), client_span())


def names(span: Span) -> list[str]:
    return [name for _, name, _ in span.events]


def transfer(incoming: IncomingPart, encoder: StubEncoder, seed: int = 1) -> None:
    """Has the part encoded, and waits until it is at both sides."""
    incoming.comes_from(encoder.source())
    incoming.made(encoder.encode(seed))
    wait_complete(incoming)
    encoder.sending.result(WAIT_S)


def test_a_transfer_is_a_span_of_the_request(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides(trace=trace) as (incoming, (encoder,), language):
        transfer(incoming, encoder)
        (span,) = seen
        assert (span.name, span.parent, span.error) == ("transfer", client_span(), "")
        told = facts(span.attributes)
        resumed = int(told.pop("resumed"))
        assert told == {"tokens": TOKENS, "bytes": SHAPE.nbytes, "transport": "tcp"}
        assert resumed == language.counters.read()["resumed_transfers", ""] > 1
    assert set(names(span)) == {"first_tokens", "resumed"}
    numbers = [facts(more)["transfer"] for _, name, more in span.events if name == "resumed"]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 1 + resumed
    assert len(seen) == 1, "the part is closed after its transfer has ended"


def test_the_stages_of_the_encoder_hang_under_its_call(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides() as (incoming, (encoder,), _):
        spans = encoder.part().traced(trace)
        transfer(incoming, encoder)
        spans.end("failed")  # as at the end of every call: nothing is left that could have failed
    assert outline(seen, OUTER) == "prepare encoder send"
    told = {span.name: facts(span.attributes) for span in seen}
    assert told == {"prepare": {}, "encoder": {"tokens": TOKENS}, "send": {"tokens": TOKENS, "bytes": SHAPE.nbytes}}
    assert is_nested(seen)


@pytest.mark.parametrize("outcome", ["aborted", "failed"])
@pytest.mark.parametrize(("is_announced", "stage"), [(False, "prepare"), (True, "encoder")])
def test_a_part_that_is_not_encoded_ends_its_stage(
    seen: list[Span], trace: RequestTrace, outcome: str, is_announced: bool, stage: str
) -> None:
    with both_sides() as (_, (encoder,), _):
        part = encoder.part()
        spans = part.traced(trace)
        if is_announced:
            part.announce(SHAPE)
        spans.end(outcome)
    assert [(span.name, span.error) for span in seen if span.error] == [(stage, outcome)]


def send_to_nobody(encoder: StubEncoder) -> OutgoingPart:
    """Encodes the part, which no language server fetches."""
    encoder.encode(1)
    return encoder.part()


def test_an_embedding_that_nobody_fetches_ends_its_span(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides() as (_, (encoder,), _):
        encoder.part().traced(trace)
        part = send_to_nobody(encoder)
        until(lambda: len(seen) == 2)
        encoder.side.parts.drop(part.part.text)
        encoder.sending.exception(WAIT_S)
    assert outline(seen, OUTER) == "prepare encoder send:aborted"


def test_a_lost_encoder_is_an_event_of_the_transfer_that_goes_on(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides(2, trace) as (incoming, (first, second), _):
        stop_in_the_middle(incoming, first)
        incoming.comes_from(second.source(attempt=1))
        incoming.made(second.encode(1, attempt=1, before=incoming.before))
        wait_complete(incoming)
    (span,) = seen
    (lost,) = (facts(more) for _, name, more in span.events if name == "lost")
    assert lost["code"]
    assert (span.error, facts(span.attributes)["tokens"]) == ("", TOKENS)


def test_a_loss_is_counted_even_if_the_callback_comes_after_the_next_encoder(
    seen: list[Span], trace: RequestTrace
) -> None:
    redirected = threading.Event()
    with both_sides(2, trace) as (incoming, (first, second), language):

        def wait_in_the_middle() -> None:
            if not redirected.is_set() and receiver_of(incoming).transferred_tokens == MIDDLE:
                assert redirected.wait(WAIT_S)

        stop_in_the_middle(incoming, first, after=wait_in_the_middle)
        incoming.comes_from(second.source(attempt=1))
        redirected.set()
        incoming.made(second.encode(1, attempt=1, before=incoming.before))
        wait_complete(incoming)
        (lost,) = (count for (name, _), count in language.counters.read().items() if name == "losses")
    assert lost == 1
    assert names(seen[0]).count("lost") == 1


def test_a_loss_is_counted_even_if_the_request_ends_before_the_callback_comes(
    seen: list[Span], trace: RequestTrace
) -> None:
    closed = threading.Event()
    with both_sides(trace=trace) as (incoming, (encoder,), language):

        def wait_in_the_middle() -> None:
            receiver = incoming._receiver
            if receiver is not None and receiver.poll() not in ENDED and receiver.transferred_tokens == MIDDLE:
                assert closed.wait(WAIT_S)

        stop_in_the_middle(incoming, encoder, after=wait_in_the_middle)
        incoming.close()
        (lost,) = (count for (name, _), count in language.counters.read().items() if name == "losses")
        closed.set()
    assert lost == 1
    assert (seen[0].error, names(seen[0]).count("lost")) == ("aborted", 1)


def test_a_transfer_that_ends_too_early_has_an_error(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides(trace=trace) as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        encoder.part().announce(SHAPE)
        until(lambda: receiver_of(incoming).total_embedding_length == TOKENS)
        incoming.close()
    assert [(span.name, span.error) for span in seen] == [("transfer", "aborted")]


def test_a_transfer_of_the_wrong_bytes_has_the_code_of_its_error(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides(trace=trace) as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        content = encoder.encode(1)
        incoming.made(type(content)(content.content, "0" * 32))
        with pytest.raises(EmbeddingTransferError) as told:
            wait_complete(incoming)
    assert [(span.name, span.error) for span in seen] == [("transfer", told.value.code)]


def test_an_embedding_that_is_fetched_again_has_two_spans(seen: list[Span], trace: RequestTrace) -> None:
    with both_sides(2, trace) as (incoming, (first, second), _):
        incoming.comes_from(first.source())
        first.encode(1)
        first.sending.result(WAIT_S)
        until(lambda: receiver_of(incoming).poll() is KVPoll.Success)
        incoming.comes_from(second.source(attempt=1))
        incoming.made(second.encode(1, attempt=1))
        wait_complete(incoming)
    assert outline(seen, OUTER) == "transfer transfer"
    assert [facts(span.attributes)["tokens"] for span in seen] == [TOKENS, TOKENS]


def test_a_part_of_a_request_without_a_trace_has_no_spans() -> None:
    with both_sides() as (incoming, (encoder,), _):
        transfer(incoming, encoder)
        assert (incoming._trace, encoder.part()._trace) == (None, None)


@pytest.mark.parametrize("carrier", ["root_span_context", "root_span_carrier"])
def test_the_context_is_that_of_sglang_s_own_span(carrier: str) -> None:
    state = {"tracing_enable": True, "rid": "r", carrier: {"traceparent": PARENT}}
    assert context_of(state) == client_span()
    assert context_of(state | {carrier: {"traceparent": PARENT[:-1] + "0"}}) is None, "it is not recorded"


@pytest.mark.parametrize("headers", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_context_is_none(headers: list[tuple[str, str]]) -> None:
    carrier = {name: value + "," + value if len(headers) > 1 else value for name, value in headers}
    assert context_of({"root_span_context": carrier}) is None


@pytest.mark.parametrize("state", [{}, {"root_span_context": None}, {"root_span_context": {"traceparent": 1}}])
def test_a_state_without_a_span_is_none(state: dict[str, object]) -> None:
    assert context_of(state) is None


PROGRAM = """
import sys
from tests.connectors.sglang.both_sides import WAIT_S, both_sides, wait_complete
from tests.connectors.sglang.stub_encoders import HttpEncoder
from tests.connectors.sglang.test_dispatcher import Desk

with both_sides() as (incoming, (encoder,), _):
    incoming.comes_from(encoder.source())
    incoming.made(encoder.encode(1))
    wait_complete(incoming)
desk = Desk()
with HttpEncoder() as encoder:
    assert desk.dispatch([encoder], 0).result(WAIT_S) is None
desk.close()
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""


def test_without_a_trace_nothing_of_opentelemetry_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
