"""Real processes of our own engine that send their spans to a collector: one tree for each request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.serve.config import (
    BootstrapSettings,
    EncodeSettings,
    LanguageSettings,
    RouterSettings,
    Settings,
    TracesSettings,
    TransferSettings,
)
from embferry.testing.stream_faults import Fault
from tests.collector import Collector, Seen, collecting
from tests.serve.pictures import data_url, encoded, noise
from tests.serve.relay.stack import RelayedStack, relayed_stack
from tests.serve.relay.trial import HANG_SECONDS, TEXT, Asked

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

ROOT = "POST /v1/chat/completions"
ENCODE, GENERATE = "encode(prepare wait encoder send)", "generate(prompt transfer prefill decode)"
TREE = f"{ROOT}(fetch {ENCODE} {GENERATE})"
SERVICES = {
    "embferry-router": {ROOT, "fetch", "encode", "generate"},
    "embferry-encode": {"prepare", "wait", "encoder", "send"},
    "embferry-language": {"prompt", "transfer", "prefill", "decode"},
}


@dataclass(frozen=True)
class Traced:
    """A running stack, its collector, and a question with its right answer."""

    stack: RelayedStack
    collector: Collector
    asked: Asked
    log: Path

    def ask(self, body: Any = None, **headers: str) -> httpx.Response:
        url = f"{self.stack.url}/v1/chat/completions"
        return httpx.post(url, json=body or self.asked.body, headers=headers, timeout=HANG_SECONDS, trust_env=False)

    def is_right(self, response: httpx.Response) -> bool:
        assert response.status_code == 200, response.text
        answer = response.json()
        told = tuple(answer["embferry"]["tokens"]), answer["choices"][0]["message"]["content"]
        return told == (self.asked.expected.tokens, self.asked.expected.text)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Embeddings travel over TCP, and fit into the pool: none is resumed unless its connection breaks."""
    asked, log = Asked.make(), tmp_path_factory.mktemp("traced") / "log"
    with collecting() as collector:

        def changed(settings: Settings) -> Settings:
            """Returns settings with the usual time-outs, which no busy machine exceeds."""
            ports = settings.router.port, settings.bootstrap.port, settings.encode.port, settings.language.port
            return Settings(
                advertise_host=settings.advertise_host,
                router=RouterSettings(port=ports[0], poll_interval=0.1),
                bootstrap=BootstrapSettings(port=ports[1]),
                encode=EncodeSettings(port=ports[2]),
                language=LanguageSettings(port=ports[3]),
                transfer=TransferSettings(transports=("tcp",), num_blocks=64, block_size=4),
                serve=settings.serve,
                traces=TracesSettings(endpoint=collector.url),
            )

        with relayed_stack("tcp", log, changed) as stack:
            yield Traced(stack, collector, asked, log)


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


class Parent:
    """A span of the client."""

    def __init__(self) -> None:
        self.trace, self.id = secrets.token_hex(16), secrets.token_hex(8)
        self.header = f"00-{self.trace}-{self.id}-01"


def events(span: Seen) -> list[str]:
    return [name for name, _ in span.events]


def test_a_request_is_one_tree_under_the_span_of_its_client(traced: Traced) -> None:
    client = Parent()
    response = traced.ask(traceparent=client.header, tracestate="vendor=x", baggage="user=ann")
    assert traced.is_right(response)
    spans = traced.collector.tree(client.trace, TREE, client.id)
    assert {one.state for one in spans.values()} == {"vendor=x"}
    for service, names in SERVICES.items():
        assert {one.name for one in spans.values() if one.service == service} == names
    root, transfer = spans[ROOT], spans["transfer"]
    told = response.json()["embferry"]["transfer"]
    expected = {"tokens": told["total_tokens"], "bytes": told["bytes"], "transport": "tcp", "resumed": 0}
    assert transfer.attributes == expected
    assert events(transfer) == ["first_tokens"]
    assert root.attributes["outcome"] == "answered"
    assert spans["encoder"].attributes == {"items": 1, "encoded": 1, "tokens": told["total_tokens"]}
    assert spans["send"].attributes["bytes"] == told["bytes"]
    assert spans["decode"].attributes == {"tokens": len(traced.asked.expected.tokens)}
    assert {one.kind for one in spans.values() if one.name in ("encode", "generate")} == {"client"}


def test_without_a_client_s_span_a_request_begins_a_trace(traced: Traced) -> None:
    assert traced.is_right(traced.ask(traceparent="nonsense"))
    root = traced.collector.wait(lambda spans: any(one.parent == "" for one in spans))
    (trace,) = {one.trace for one in root if one.parent == "" and one.name == ROOT} - _of_clients(traced)
    traced.collector.tree(trace, TREE)


def _of_clients(traced: Traced) -> set[str]:
    return {one.trace for one in traced.collector.spans if one.name == ROOT and one.parent}


def test_a_connection_that_is_cut_is_a_resume_in_the_same_tree(traced: Traced) -> None:
    client, data = Parent(), traced.stack.relays["data"]
    before = sum(data.to_upstream)
    assert traced.is_right(traced.ask())
    data.arm(Fault("cut", at=(sum(data.to_upstream) - before) // 2))
    response = traced.ask(traceparent=client.header)
    assert data.struck.is_set()
    data.disarm()
    assert traced.is_right(response)
    spans = traced.collector.tree(client.trace, TREE, client.id)
    resumed = response.json()["embferry"]["transfer"]["resumed"]
    assert spans["transfer"].attributes["resumed"] == resumed > 0
    assert "resumed" in events(spans["transfer"])
    assert {one.error for one in spans.values()} == {""}


@pytest.mark.parametrize(
    ("content", "code", "outline"),
    [
        ([{"type": "text", "text": "why? " * 20_000}], "context_length_exceeded", "generate:{0}(prompt:{0})"),
        ([picture(encoded(noise(96, 64))[:-200])], "image_truncated", "encode:{0}(prepare:refused)"),
    ],
)
def test_a_request_that_fails_has_error_statuses_in_one_tree(
    traced: Traced, content: list[Any], code: str, outline: str
) -> None:
    client = Parent()
    body = {"model": "shapes", "messages": [{"role": "user", "content": content}]}
    response = traced.ask(body, traceparent=client.header)
    assert response.json()["error"]["code"] == code
    traced.collector.tree(client.trace, f"{ROOT}:{code}(fetch {outline.format(code)})", client.id)


@pytest.mark.parametrize("how", ["down", "slow", "refusing"])
def test_with_a_collector_that_fails_the_answers_are_the_same(traced: Traced, how: str) -> None:
    collector = traced.collector
    if how == "down":
        with collector.down():
            answers = [traced.ask() for _ in range(5)]
    elif how == "slow":
        collector.hold.clear()
        answers = [traced.ask() for _ in range(5)]
        collector.hold.set()
    else:
        collector.status = 503
        answers = [traced.ask() for _ in range(5)]
        collector.status = 200
    assert all(map(traced.is_right, answers))
    client = Parent()
    assert traced.is_right(traced.ask(traceparent=client.header))
    traced.collector.tree(client.trace, TREE, client.id)
    lines = re.findall(r"(\S+)\[\d+\] embferry\.traces\.otlp: spans do not reach", traced.log.read_text())
    assert len(lines) == len(set(lines))  # one a minute of each process


def test_spans_hold_nothing_that_the_client_or_the_model_has_said(traced: Traced) -> None:
    sent = b"".join(traced.collector.bodies)
    assert len(sent) > 1000
    answer = traced.asked.expected.text
    for secret in (TEXT, answer, "base64", "user=ann"):
        assert secret.encode() not in sent
