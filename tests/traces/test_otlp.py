"""Spans on their way to a collector that is well, down, slow or hostile."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from embferry.protocol.errors import EmbferryError
from embferry.traces import otlp
from embferry.traces.context import parse
from embferry.traces.otlp import open_tracer, url_of
from embferry.traces.spans import MAX_EVENTS, Span, Tracer
from tests.collector import Collector, collecting
from tests.ports import free_port

pytestmark = pytest.mark.integration
PARENT = parse(f"00-{'ab' * 16}-{'cd' * 8}-01", "vendor=x")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setattr(otlp, "DELAY", 0.01)
    monkeypatch.setattr(otlp, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(otlp, "TIMEOUT", 2.0)
    with collecting() as running:
        yield running


def tracer_to(url: str) -> Tracer:
    tracer = open_tracer(url, "service")
    assert tracer is not None
    return tracer


def test_a_span_arrives_as_it_was_made(collector: Collector) -> None:
    tracer = tracer_to(collector.url)
    outer = tracer.begin("outer", PARENT, "server")
    inner = outer.begin("inner", "client")
    inner.set(tokens=5, transport="shm", stream=True)
    inner.event("resumed", None, transfer=2)
    inner.end("peer_gone")
    outer.end()
    found = {one.name: one for one in collector.wait(lambda spans: len(spans) == 2)}
    tracer.close()
    told = found["inner"]
    assert (told.service, told.kind, told.error) == ("service", "client", "peer_gone")
    assert told.attributes == {"tokens": 5, "transport": "shm", "stream": True}
    assert told.events == (("resumed", {"transfer": 2}),)
    assert (told.trace, told.parent) == (found["outer"].trace, found["outer"].id)
    assert (found["outer"].trace, found["outer"].parent, found["outer"].state) == ("ab" * 16, "cd" * 8, "vendor=x")
    assert found["outer"].began <= told.began <= told.ended <= found["outer"].ended
    assert collector.paths == {"/v1/traces"}


def test_the_last_spans_are_sent_at_the_end(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "DELAY", 60.0)
    monkeypatch.setattr(otlp, "CLOSE_SECONDS", 60.0)
    tracer = tracer_to(collector.url)
    tracer.begin("one", None).end()
    tracer.close()
    assert [one.name for one in collector.spans] == ["one"]
    tracer.begin("late", None).end()
    tracer.close()


def test_a_path_is_kept() -> None:
    assert url_of("http://c:4318") == url_of("http://c:4318/") == "http://c:4318/v1/traces"
    assert url_of("https://c/api/otlp") == "https://c/api/otlp"


def test_spans_that_are_not_sampled_stay_here() -> None:
    seen: list[Span] = []
    tracer = Tracer(seen.append, share=0.0)
    span = tracer.begin("new", None)
    assert span.context.parent.endswith("-00")
    span.begin("inner").end()
    span.end()
    assert seen == []
    tracer.begin("given", PARENT).end()
    assert [one.name for one in seen] == ["given"]


def test_a_span_is_bounded() -> None:
    seen: list[Span] = []
    span = Tracer(seen.append).begin("long", None)
    for number in range(10 * MAX_EVENTS):
        span.event("resumed", None, transfer=number)
        span.set(**{f"fact{number}": "x" * 10_000})
    span.end()
    span.end()
    (one,) = seen
    assert len(one.events) == MAX_EVENTS
    assert len(one.attributes) < 100
    assert max(len(str(value)) for value in one.attributes.values()) < 300


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def failed_once(tracer: Tracer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sends spans, of which at least two batches fail. Returns the only log line."""
    batches = threading.Semaphore(0)
    failed = otlp.Exporter._failed

    def counted(self: otlp.Exporter, reason: str, spans: int) -> None:
        failed(self, reason, spans)
        batches.release()

    monkeypatch.setattr(otlp.Exporter, "_failed", counted)
    for _ in range(2):
        tracer.begin("lost", None).end()
        assert batches.acquire(timeout=60)
    tracer.close()
    (line,) = lines(caplog)
    return line


@pytest.mark.parametrize("status", [400, 500, 503, 302])
def test_a_collector_that_refuses_costs_one_log_line(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    collector.status = status
    line = failed_once(tracer_to(collector.url), caplog, monkeypatch)
    assert collector.url in line
    assert collector.paths == {"/v1/traces"}  # not where it has redirected to


def test_a_collector_that_is_down_costs_one_log_line(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert url in failed_once(tracer_to(url), caplog, monkeypatch)


def test_a_collector_without_an_answer_does_not_keep_the_process(collector: Collector) -> None:
    collector.hold.clear()
    tracer = tracer_to(collector.url)
    tracer.begin("kept", None).end()
    collector.wait_requests(1)
    tracer.close()  # ends all the same


def test_an_answer_without_an_end_is_not_read(collector: Collector) -> None:
    collector.endless = True
    tracer = tracer_to(collector.url)
    for number in range(3):
        tracer.begin(f"span {number}", None).end()
        collector.wait(lambda spans, number=number: len(spans) == number + 1)  # type: ignore[misc]
    tracer.close()
    assert collector.sent_bytes < 100 << 20


def test_spans_that_wait_are_bounded(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "MAX_QUEUED", 8)
    collector.hold.clear()
    exporter = otlp.Exporter(collector.url, "service")
    tracer = Tracer(exporter.add)
    tracer.begin("first", None).end()
    collector.wait_requests(1)
    for _ in range(100):
        tracer.begin("more", None).end()
    assert len(exporter._queue) == 8
    exporter.close()


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(EmbferryError, match=r"--traces-endpoint is set.*embferry\[traces\].*opentelemetry-sdk"):
        open_tracer("http://127.0.0.1:1", "service", setting="--traces-endpoint")


def test_without_an_endpoint_nothing_is_imported() -> None:
    program = (
        "import sys; from embferry.serve.config import Settings; from embferry.serve.router.app import build;"
        "import embferry.serve.vllm.app, embferry.serve.encode.process, embferry.serve.language.process;"
        "build(Settings()); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
