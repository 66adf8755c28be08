"""The plug-in's spans in SGLang's traces: whose parts they are, and how they get to SGLang's exporter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from embferry.traces.context import TraceContext
from embferry.traces.spans import Tracer
from tests.traces.recorded import OUTER, PARENT, TRACE, client_span

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # warnings of SGLang and torch, when SGLang is imported without a GPU
]

HEADERS = [(b"traceparent", PARENT.encode())]
STATE = {"trace_ctx": {"tracing_enable": True, "root_span_context": {"traceparent": PARENT}}}


@pytest.fixture
def tracing() -> Iterator[Any]:
    """The module; SGLang's traces are off."""
    from embferry.connectors.sglang.inside import tracing

    tracing._tracer.cache_clear()
    yield tracing
    tracing._tracer.cache_clear()


@pytest.fixture
def exported(tracing: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's traces are on, with an exporter that keeps the spans."""
    import opentelemetry.trace as api
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from sglang.srt.observability import trace

    exporter = InMemorySpanExporter()
    provider = TracerProvider(id_generator=trace.TraceCustomIdGenerator())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(api, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "tracer", provider.get_tracer("sglang server"))
    monkeypatch.setattr(trace, "opentelemetry_initialized", True)
    return exporter


def request_with(context: Any) -> Any:
    """Returns a request as a scheduler has it."""
    return SimpleNamespace(time_stats=SimpleNamespace(trace_ctx=context))


def context_of_sglang(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns SGLang's trace of a request of a client with a span of its own."""
    from sglang.srt.observability import trace, trace_async

    monkeypatch.setattr(trace_async, "is_async_tracing_available", lambda: True)
    made = {"usual": trace.TraceReqContext, "asynchronous": trace_async.TraceReqContextAsync}[kind]
    context = made("rid", module_name="request", external_trace_header={"traceparent": PARENT})
    context.trace_req_start()
    return context


def test_while_traces_are_off_nothing_is_made(tracing: Any) -> None:
    from sglang.srt.observability.trace import TraceNullContext

    assert tracing.of_headers(HEADERS) is None
    assert tracing.of_state(STATE) is None
    assert tracing.of_request(request_with(TraceNullContext())) is None
    assert tracing._tracer.cache_info().currsize == 0


@pytest.mark.parametrize("kind", ["usual", "asynchronous"])
def test_spans_of_a_language_server_hang_under_sglang_s_own(
    tracing: Any, exported: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    context = context_of_sglang(kind, monkeypatch)
    around = tracing.of_request(request_with(context)).around
    assert tracing.of_state({"trace_ctx": context.__getstate__()}).around == around
    context.trace_req_finish()
    (own,) = (span for span in exported.get_finished_spans() if f"{span.parent and span.parent.span_id:016x}" == OUTER)
    assert (f"{around.trace_id:032x}", around.span_id) == (TRACE, own.context.span_id)


def test_spans_of_an_encoder_hang_under_the_call_that_its_headers_name(tracing: Any, exported: Any) -> None:
    assert tracing.of_headers(HEADERS).around == client_span()


@pytest.mark.parametrize("value", [b"nonsense", PARENT[:-1].encode() + b"0"], ids=["malformed", "not sampled"])
def test_a_call_without_a_span_has_none(tracing: Any, exported: Any, value: bytes) -> None:
    assert tracing.of_headers([(b"traceparent", value)]) is None
    assert tracing.of_headers([]) is None


def test_a_request_that_sglang_does_not_trace_has_no_spans(tracing: Any, exported: Any) -> None:
    from sglang.srt.observability.trace import TraceNullContext

    assert tracing.of_state(None) is None
    assert tracing.of_state({"trace_ctx": {"tracing_enable": False}}) is None
    assert tracing.of_request(request_with(TraceNullContext())) is None
    assert tracing.of_request(SimpleNamespace(time_stats=None)) is None


def test_a_span_reaches_sglang_s_exporter_as_it_is(tracing: Any, exported: Any) -> None:
    span = Tracer(tracing.Export()).begin("encode", client_span(), "client")
    span.set(worker="http://e:1", part=0)
    span.event("resumed", None, transfer=2)
    span.end("refused")
    (seen,) = exported.get_finished_spans()
    assert (seen.name, seen.kind.name, seen.status.description) == ("encode", "CLIENT", "refused")
    assert (f"{seen.context.trace_id:032x}", seen.context.span_id) == (TRACE, span.context.span_id)
    assert (f"{seen.parent.span_id:016x}", seen.parent.is_remote) == (OUTER, True)
    assert dict(seen.attributes) == {"embferry.worker": "http://e:1", "embferry.part": 0}
    ((name, facts, at),) = ((event.name, dict(event.attributes), event.timestamp) for event in seen.events)
    assert (name, facts) == ("resumed", {"embferry.transfer": 2})
    assert (seen.start_time, seen.end_time) == span.times
    assert seen.start_time <= at <= seen.end_time


def test_the_state_of_the_client_s_trace_is_passed_on(tracing: Any, exported: Any) -> None:
    outer = client_span()
    parent = TraceContext(outer.trace_id, outer.span_id, sampled=True, state="vendor=x")
    Tracer(tracing.Export()).begin("transfer", parent).end()
    (seen,) = exported.get_finished_spans()
    assert seen.context.trace_state.to_header() == "vendor=x"


def test_an_error_on_the_way_to_the_exporter_costs_the_span_alone(
    tracing: Any, exported: Any, caplog: pytest.LogCaptureFixture
) -> None:
    export = tracing.Export()
    export._tracer = None
    tracer = Tracer(export)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tracer.begin("transfer", client_span()).end()
    assert [record.name for record in caplog.records] == [tracing.__name__]
    assert not exported.get_finished_spans()


def test_the_number_of_a_span_that_is_lost_goes_to_no_other(tracing: Any, exported: Any) -> None:
    from sglang.srt.observability import trace

    export = tracing.Export()
    export._tracer = None
    lost = Tracer(export).begin("transfer", client_span())
    lost.end()
    assert trace.tracer.start_span("SGLang's next").get_span_context().span_id != lost.context.span_id
