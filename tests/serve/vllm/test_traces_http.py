"""Real instances of ``vllm serve`` behind the router, whose spans and ours come together at one collector."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.collector import Collector, Seen, collecting
from tests.serve.vllm.servers import API_KEY, CONDITION_S, EMBFERRY, GREEDY, MORE, VLLM, Servers, picture, video
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

ROOT = "POST /v1/chat/completions"
SERVICES = {
    ("embferry-router", ROOT), ("embferry-router", "fetch"), ("embferry-router", "encode"),
    ("embferry-router", "generate"), ("embferry-router", "decode"), ("embferry-connector", "transfer"),
    ("vllm-encode-0", "llm_request"), ("vllm-language-0", "llm_request"),
}  # fmt: skip


class TracedServers(Servers):
    """One encoder, one language instance and the router, which send their spans to a collector."""

    def __init__(self, folder: Path, collector: Collector) -> None:
        self.collector = collector
        self._prepare(folder, {"OTEL_BSP_SCHEDULE_DELAY": "200"})
        words = ("serve", "--engine", "vllm", "--model", str(folder / "model"), "--port", "0")
        traces = ("--restart-delay", "0.1", "--traces-endpoint", collector.url)
        self.split = self.start(self._log, *EMBFERRY, *words, *traces, "--", *VLLM)

    def ask(self, *content: object, traceparent: str = "", stream: bool = True) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **GREEDY, **MORE}
        headers = {"Authorization": f"Bearer {API_KEY}"} | ({"traceparent": traceparent} if traceparent else {})
        url = f"{self.url}/v1/chat/completions"
        asked = {"json": body | {"stream": stream}, "headers": headers, "timeout": CONDITION_S}
        response = httpx.post(url, trust_env=False, **asked)  # type: ignore[arg-type]
        assert response.status_code == 200, response.text
        return response

    def spans_of(self, outline: str, *content: object, stream: bool = True) -> list[Seen]:
        """Asks, and returns the spans, which have this outline below that of the client."""
        trace, span = secrets.token_hex(16), secrets.token_hex(8)
        self.ask(*content, traceparent=f"00-{trace}-{span}-01", stream=stream)
        self.collector.tree(trace, outline, span)
        return [one for one in self.collector.spans if one.trace == trace]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedServers]:
    with collecting() as collector:
        running = TracedServers(tmp_path_factory.mktemp("traced"), collector)
        try:
            running.wait("ready:")
            yield running
        finally:
            running.close()


def test_a_request_is_one_tree_of_router_instances_and_transfer(servers: TracedServers) -> None:
    servers.ask(picture(1), text())  # the router learns from the first answer of the encoder
    outline = f"{ROOT}(fetch encode(llm_request) generate(llm_request(transfer) decode))"
    spans = servers.spans_of(outline, picture(2), text())
    assert {(one.service, one.name) for one in spans} == SERVICES
    (transfer,) = (one for one in spans if one.name == "transfer")
    assert transfer.attributes["tokens"] > 0
    assert transfer.error == ""
    (root,) = (one for one in spans if one.name == ROOT)
    assert root.attributes["outcome"] == "answered"


def test_each_picture_has_its_encode_and_its_transfer(servers: TracedServers) -> None:
    spans = servers.spans_of("", picture(3), picture(4, 448, 224), text())
    assert sum(one.name == "transfer" for one in spans) == 2


def test_texts_and_videos_have_trees_too(servers: TracedServers) -> None:
    servers.spans_of(f"{ROOT}(fetch generate(llm_request decode))", text())
    servers.spans_of(f"{ROOT}(fetch generate(llm_request))", text(), stream=False)
    servers.spans_of("", video(5, 4), text())


def test_a_malformed_parent_counts_as_none(servers: TracedServers) -> None:
    answer = servers.ask(text(), traceparent="nonsense")
    assert answer.status_code == 200
    servers.collector.wait(lambda spans: any(one.parent == "" and one.name == ROOT for one in spans))


def test_spans_hold_nothing_that_the_client_has_said(servers: TracedServers) -> None:
    sent = b"".join(servers.collector.bodies)
    assert len(sent) > 1000
    for secret in (b"what is there", b"base64", API_KEY.encode()):
        assert secret not in sent
