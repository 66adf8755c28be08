"""Servers with the model in this package, which has deepstack (Qwen3-VL): its tokens are several times as wide.

SGLang's traces are switched on in them, so a collector has its spans and the plug-in's.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.models import model_path
from tests.collector import Collector, Seen, collecting, outline_of
from tests.ports import free_port

from .servers import ANSWER_S, DIVIDED, PLUGIN, POOL_TOKENS, Server
from .stage import started

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

MEDIA = Path(__file__).parents[3] / "examples" / "media"
QUESTION = "what colour is the square?"
TOKENS = 64
"""The length of the embedding."""
OURS = {"encode", "prepare", "encoder", "send", "transfer"}
THEIRS = {"tokenize", "mm_encode", "prefill_forward"}
"""Some of SGLang's own spans, of each of its processes."""


@dataclass
class Traced:
    """An encoder and a language server, and the collector that both send spans to."""

    language: Server
    collector: Collector

    def answer(self, traceparent: str = "", name: str = "garden.png") -> str:
        """Asks about a picture."""
        url = "data:image/png;base64," + base64.b64encode((MEDIA / name).read_bytes()).decode()
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION},
        ]
        body = {"model": "m", "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": content}]}
        headers = {"traceparent": traceparent} if traceparent else {}
        url = f"{self.language.url}/v1/chat/completions"
        response = httpx.post(url, json=body, headers=headers, timeout=ANSWER_S, trust_env=False)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"]).strip()

    def spans(self) -> tuple[str, list[Seen]]:
        """Asks as a client with a span of its own. Returns its number and the spans of the request."""
        trace, span = secrets.token_hex(16), secrets.token_hex(8)
        assert self.answer(f"00-{trace}-{span}-01") == "blue"

        def of_request(spans: list[Seen]) -> list[Seen]:
            return [one for one in spans if one.trace == trace]

        def is_whole(spans: list[Seen]) -> bool:
            found = of_request(spans)
            is_one = "+" not in outline_of(found, span)
            return is_one and {one.name for one in found} >= OURS | THEIRS and any(one.parent == span for one in found)

        found = self.collector.wait(is_whole, lambda spans: outline_of(of_request(spans), span))
        return span, of_request(found)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder, model = tmp_path_factory.mktemp("small"), model_path("shapes")
    environment = PLUGIN | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with collecting() as collector:
        shared = [*DIVIDED, "--enable-trace", "--otlp-traces-endpoint", f"{collector.url}/v1/traces"]
        encodes = ["--encoder-only", "--otlp-service-name", "encoder", *shared]
        with Server(model, folder / "encoder.log", encodes, environment) as encoder:
            answers = ["--language-only", "--encoder-urls", encoder.url, "--otlp-service-name", "language", *shared]
            answers += ["--encoder-bootstrap-port", str(free_port())]
            with Server(model, folder / "language.log", answers, environment) as language:
                started([encoder, language])
                yield Traced(language, collector)


def one(spans: list[Seen], name: str) -> Seen:
    """Returns the only span of this name."""
    (found,) = (span for span in spans if span.name == name)
    return found


def test_a_picture_is_understood(traced: Traced) -> None:
    assert traced.answer() == "blue"
    assert "completed with resumed transfer" in traced.language.text()


def test_a_request_is_one_tree_from_the_client_through_both_servers(traced: Traced) -> None:
    outer, spans = traced.spans()
    (request,) = (span for span in spans if span.parent == outer)
    encode = one(spans, "encode")
    parents = {span.name: span.parent for span in spans if span.name in OURS}
    assert parents == {
        "encode": request.id,
        "transfer": request.id,
        **dict.fromkeys(("prepare", "encoder", "send"), encode.id),
    }
    services = {span.name: span.service for span in spans if span.name in OURS}
    assert services == {
        **dict.fromkeys(("encode", "transfer"), "language"),
        **dict.fromkeys(("prepare", "encoder", "send"), "encoder"),
    }
    assert {span.error for span in spans} == {""}
    assert encode.kind == "client"
    assert encode.began <= one(spans, "prepare").began <= one(spans, "encoder").began <= one(spans, "send").began


def test_a_transfer_through_a_small_pool_has_its_resumes_as_events(traced: Traced) -> None:
    _, spans = traced.spans()
    transfer, send = one(spans, "transfer"), one(spans, "send")
    resumed = [facts["transfer"] for name, facts in transfer.events if name == "resumed"]
    assert TOKENS > POOL_TOKENS
    assert resumed[-1] == 1 + transfer.attributes["resumed"]
    assert transfer.attributes["resumed"] >= TOKENS // POOL_TOKENS - 1
    assert ("first_tokens", {}) in transfer.events
    assert transfer.attributes["transport"] == "tcp"
    assert transfer.attributes["tokens"] == send.attributes["tokens"] == one(spans, "encoder").attributes["tokens"]
    assert transfer.attributes["tokens"] == TOKENS
    assert transfer.attributes["bytes"] == send.attributes["bytes"] > 0


def test_a_client_that_wants_no_spans_gets_none(traced: Traced) -> None:
    trace = secrets.token_hex(16)
    assert traced.answer(f"00-{trace}-{secrets.token_hex(8)}-00") == "blue"
    traced.spans()  # what comes later is there
    assert not [span for span in traced.collector.spans if span.trace == trace]


def test_spans_hold_nothing_that_the_client_has_said(traced: Traced) -> None:
    traced.spans()
    sent = b"".join(traced.collector.bodies)
    for secret in (QUESTION.encode(), b"base64", b"blue"):
        assert secret not in sent


def test_a_collector_that_hangs_or_is_gone_costs_spans_and_nothing_else(traced: Traced) -> None:
    traced.collector.hold.clear()
    before = traced.collector.requests
    assert traced.answer() == "blue"
    traced.collector.wait_requests(before + 1)  # it gets no answer
    assert traced.answer() == "blue"
    traced.collector.hold.set()
    with traced.collector.down():
        assert traced.answer() == "blue"
