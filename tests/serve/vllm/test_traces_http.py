"""Real instances of ``vllm serve`` behind the router, whose spans and ours come together at one collector."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.collector import Collector, Seen, collecting
from tests.serve.vllm.servers import API_KEY, TracedServers, picture, video
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

ROOT = "POST /v1/chat/completions"
ENCODE = "encode(llm_request)"
SERVICES = {
    ("embferry-router", ROOT), ("embferry-router", "fetch"), ("embferry-router", "encode"),
    ("embferry-router", "generate"), ("embferry-connector", "transfer"),
    ("vllm-encode-0", "llm_request"), ("vllm-language-0", "llm_request"),
}  # fmt: skip


class Asker:
    """Asks one of the routers as a client that has a span of its own."""

    def __init__(self, servers: TracedServers, collector: Collector, url: str) -> None:
        self._servers, self.collector, self._url = servers, collector, url

    def ask(self, *content: Any, traceparent: str = "", stream: bool = False) -> None:
        self._servers.ask(*content, url=self._url, traceparent=traceparent, stream=stream)

    def spans(self, outline: str, *content: Any, stream: bool = False) -> list[Seen]:
        """Asks, and returns the spans, which have this outline below the client's."""
        trace, span = secrets.token_hex(16), secrets.token_hex(8)
        self.ask(*content, traceparent=f"00-{trace}-{span}-01", stream=stream)
        self.collector.tree(trace, outline, span)
        return [one for one in self.collector.spans if one.trace == trace]


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Asker]]:
    """Two routers before the same instances, by their ``vllm.overlap``."""
    with collecting() as collector:
        running = TracedServers(tmp_path_factory.mktemp("traced"), collector.url)
        try:
            running.wait("ready:")
            urls = {"pictures": running.url, "off": running.another_router("off")}
            askers = {overlap: Asker(running, collector, url) for overlap, url in urls.items()}
            for number, asker in enumerate(askers.values()):
                asker.ask(picture(number), text())  # the router learns from the first answer of the encoder
            yield askers
        finally:
            running.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("overlap", ["off", "pictures"])
def test_a_request_is_one_tree_of_router_instances_and_transfer(
    routers: dict[str, Asker], overlap: str, stream: bool
) -> None:
    content = picture(10 + 2 * stream + (overlap == "off")), text()
    decode = " decode" if stream else ""
    outline = f"{ROOT}(fetch {ENCODE} generate(llm_request transfer{decode}))"
    spans = routers[overlap].spans(outline, *content, stream=stream)
    assert {(one.service, one.name) for one in spans if one.name != "decode"} == SERVICES
    (transfer,) = (one for one in spans if one.name == "transfer")
    assert transfer.attributes["tokens"] > 0
    assert transfer.attributes["transport"] == "shm"
    assert {one.error for one in spans} == {""}
    (root,) = (one for one in spans if one.name == ROOT)
    assert root.attributes["outcome"] == "answered"


def test_each_picture_has_its_encode_and_its_transfer(routers: dict[str, Asker]) -> None:
    outline = f"{ROOT}(fetch {ENCODE} {ENCODE} generate(llm_request transfer transfer))"
    routers["off"].spans(outline, picture(20), picture(21, 448, 224), text())


def test_texts_and_videos_have_trees_too(routers: dict[str, Asker]) -> None:
    routers["pictures"].spans(f"{ROOT}(fetch generate(llm_request decode))", text(), stream=True)
    routers["pictures"].spans(f"{ROOT}(fetch {ENCODE} generate(llm_request transfer))", video(5, 4), text())


def test_a_malformed_parent_counts_as_none(routers: dict[str, Asker]) -> None:
    asker = routers["pictures"]
    before = {one.id for one in asker.collector.spans}
    asker.ask(text("hi"), traceparent="nonsense")
    asker.collector.wait(
        lambda spans: any(one.id not in before and one.name == ROOT and one.parent == "" for one in spans)
    )


def test_spans_hold_nothing_that_the_client_has_said(routers: dict[str, Asker]) -> None:
    sent = b"".join(routers["off"].collector.bodies)
    assert len(sent) > 1000
    for secret in (b"what is there", b"base64", API_KEY.encode()):
        assert secret not in sent
