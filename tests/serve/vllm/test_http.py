"""Real instances of ``vllm serve`` behind the router, asked by OpenAI's client."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from embferry.serve.vllm.probe_items import probe_sound
from tests.ports import free_port
from tests.serve.vllm.servers import (
    CONDITION_S,
    EMBFERRY,
    ENCODERS,
    GREEDY,
    MORE,
    START_S,
    Servers,
    orphans,
    picture,
    until,
    video,
)
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]


CONTENTS = {
    "one": [picture(1), text()],
    "four, one of them twice": [picture(2), text("and"), picture(3, 448, 224), picture(2), text(), picture(4)],
    "large": [picture(5, 896, 896), text()],
    "a video": [video(6, 4), text()],
    "a video and a picture": [text("first"), video(7, 8), picture(8), text()],
    "none": [text()],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CONTENTS)
def test_the_tokens_are_those_of_the_undivided_model(servers: Servers, what: str, stream: bool) -> None:
    expected = servers.tokens(servers.undivided, *CONTENTS[what])
    assert len(expected) == 16
    assert servers.tokens(servers.url, *CONTENTS[what], stream=stream) == expected


def test_the_language_instance_is_asked_while_pictures_are_encoded(servers: Servers) -> None:
    contents = [[picture(60 + number, 224 + 56 * number, 168), text(), picture(70 + number)] for number in range(4)]
    expected = [servers.tokens(servers.undivided, *content) for content in contents]
    more = count(1000)
    while not all(servers.encoded_by(f"encode-{encoder}") for encoder in range(ENCODERS)):
        servers.tokens(servers.url, picture(next(more)), text())  # the router learns from the first answer of each
    before, every = servers.counted('overlapped_total{outcome="used"}'), servers.counted("overlapped_total")
    assert [servers.tokens(servers.url, *content, stream=True) for content in contents] == expected
    assert servers.counted('overlapped_total{outcome="used"}') - before == len(contents)
    assert servers.counted("overlapped_total") - every == len(contents)


def test_prometheus_finds_the_metrics_of_each_connector(servers: Servers) -> None:
    encoders = [f"encode-{encoder}" for encoder in range(ENCODERS)]

    def encoded() -> float:
        return sum(servers.counted_by_connector(encoder, "items_encoded_total") for encoder in encoders)

    before = encoded(), servers.counted_by_connector("language-0", "transfers_total")
    servers.tokens(servers.url, picture(95), text())
    after = encoded(), servers.counted_by_connector("language-0", "transfers_total")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_a_repeated_picture_is_not_encoded_again(servers: Servers) -> None:
    first, second = picture(90, 448, 224), picture(91)
    contents = [[first, text()], [text("and"), first, second, text()], [second, first, text("again")]]
    before = servers.counted("encodes_total"), servers.counted("encodes_skipped_total")
    answers = [servers.tokens(servers.url, *content, stream=bool(at % 2)) for at, content in enumerate(contents)]
    assert answers == [servers.tokens(servers.undivided, *content) for content in contents]
    after = servers.counted("encodes_total"), servers.counted("encodes_skipped_total")
    assert (after[0] - before[0], after[1] - before[1]) == (2, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_at_responses_come_from_encode_instances(servers: Servers, stream: bool) -> None:
    pictures = [picture(110 + 2 * stream, 448, 224), picture(111 + 2 * stream)]
    parts = [{"type": "input_image", "image_url": one["image_url"]["url"], "detail": "auto"} for one in pictures]
    content = [*parts, {"type": "input_text", "text": "what is this?"}]
    asked: dict[str, Any] = {"model": "tiny", "input": [{"role": "user", "content": content}]}
    asked |= {"temperature": 0, "max_output_tokens": 16, "extra_body": {"ignore_eos": True}}
    before = servers.counted("encodes_total"), servers.received_by("language-0")
    with servers.client(servers.undivided) as client:
        expected = client.responses.create(**asked).output_text
    assert expected
    with servers.client(servers.url) as client:
        if stream:
            events = client.responses.create(**asked, stream=True)
            said = "".join(one.delta for one in events if one.type == "response.output_text.delta")
        else:
            said = client.responses.create(**asked).output_text
    assert said == expected
    assert servers.counted("encodes_total") == before[0] + 2
    until(lambda: servers.received_by("language-0") == before[1] + 2)


def test_concurrent_requests_with_one_picture_share_one_encode(servers: Servers) -> None:
    contents = [[picture(92, 896, 448), text(f"question {number}")] for number in range(8)]
    before = servers.counted("encodes_total")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda content: servers.tokens(servers.url, *content), contents))
    assert servers.counted("encodes_total") == before + 1
    assert found == [servers.tokens(servers.undivided, *content) for content in contents]


def test_concurrent_requests_are_answered_correctly(servers: Servers) -> None:
    contents = [
        [picture(100 + number, 224, 168 + 28 * (number % 4)), text(f"question {number}")] for number in range(12)
    ]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda content: servers.tokens(servers.url, *content), contents))
    assert found == [servers.tokens(servers.undivided, *content) for content in contents]


def test_usage_and_logprobs_are_those_of_vllm(servers: Servers) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": CONTENTS["one"]}], **GREEDY}
    with servers.client(servers.url) as split, servers.client(servers.undivided) as undivided:
        ours, theirs = (
            client.chat.completions.create(**asked, logprobs=True, extra_body=MORE) for client in (split, undivided)
        )
        assert ours.usage == theirs.usage
        assert ours.choices == theirs.choices
        chunks = list(split.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage == theirs.usage


def test_errors_reach_the_client(servers: Servers) -> None:
    import openai

    def ask(*content: Any, **more: Any) -> Any:
        with servers.client(servers.url) as client:
            return client.chat.completions.create(
                **{"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **more}
            )

    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="cannot read this picture"):
        ask(broken, text())
    with pytest.raises(openai.BadRequestError, match=r"At most 0 audio\(s\) may be provided in one prompt"):
        ask(probe_sound().part(), text())
    with pytest.raises(openai.NotFoundError):
        ask(picture(1), model="other")
    with pytest.raises(openai.BadRequestError, match="cannot come from a client"):
        ask({"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 12, 16]}, "uuid": "x"}, text())
    with pytest.raises(openai.BadRequestError, match="cannot come from a client"):
        ask(picture(1), text(), extra_body={"ec_transfer_params": {}})
    with pytest.raises(openai.BadRequestError):
        ask(picture(1), text("word " * 5000))


def test_a_language_instance_without_the_connector_is_an_error(servers: Servers, tmp_path: Path) -> None:
    import openai

    encoder = servers.at("encode-0")
    port = free_port()
    words = ("router", "--engine", "vllm", "--encode-urls", encoder, "--language-urls", servers.undivided)
    router = servers.start(tmp_path / "router.log", *EMBFERRY, *words, "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    try:
        servers.wait("the router", f"{url}/ready")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="started as ec_consumer"):
                servers.tokens(url, *CONTENTS["one"], stream=stream)
    finally:
        router.send_signal(signal.SIGINT)
        assert router.wait(CONDITION_S) == 0


def lost_under_way(servers: Servers, contents: list[list[Any]]) -> tuple[list[Any], int]:
    """Asks all at once, and kills the encoder of most items after all are encoded and before any is fetched.

    Returns:
        The tokens of each answer, or its error; and the number of items that the encoder had.
    """
    import openai

    def ask(number: int) -> Any:
        try:
            return servers.tokens(servers.url, *contents[number], stream=bool(number % 2))
        except openai.InternalServerError as error:
            return error

    before, encodes = {name: servers.encoded_by(name) for name in servers.up()}, servers.counted("encodes_total")
    with ThreadPoolExecutor(len(contents)) as pool:
        with servers.held("language-0"):
            asked = [pool.submit(ask, number) for number in range(len(contents))]
            until(lambda: servers.counted("encodes_total") == encodes + len(contents))
            until(lambda: sum(map(servers.encoded_by, before)) == sum(before.values()) + len(contents))
            had, name = max((int(servers.encoded_by(name) - before[name]), name) for name in before)
            servers.kill(name)
        return [one.result() for one in asked], had


def test_lost_embeddings_come_from_the_other_encoder(servers: Servers) -> None:
    contents = [[picture(300 + number, 896, 448), text()] for number in range(4)]
    before = servers.counted("failovers_total"), servers.counted("chat_second_attempts_total")
    answers, had = lost_under_way(servers, contents)
    assert answers == [servers.tokens(servers.undivided, *content) for content in contents]
    after = servers.counted("failovers_total"), servers.counted("chat_second_attempts_total")
    assert (after[0] - before[0], after[1] - before[1]) == (had, 0)


def test_without_another_encoder_the_client_gets_the_reason(servers: Servers) -> None:
    assert len(servers.up()) == 1  # the other one is still starting
    answers, _ = lost_under_way(servers, [[picture(310 + number), text()] for number in range(2)])
    for error in answers:
        assert error.status_code == 503
        assert "before that" in error.body["message"]
        assert "the router has no other producer" in error.body["message"]


def test_after_the_restart_of_an_encoder_requests_are_answered_again(servers: Servers) -> None:
    import openai

    content = [picture(320), text()]
    deadline = time.monotonic() + START_S
    answer: Any = None
    while answer is None:
        assert time.monotonic() < deadline
        failure = None
        try:
            answer = servers.tokens(servers.url, *content)
        except openai.InternalServerError as error:
            failure = error
        if failure is not None:
            assert (failure.status_code, failure.code) == (503, "no_worker")
            assert failure.response.headers["retry-after"] == "1"
            time.sleep(0.2)
    assert answer == servers.tokens(servers.undivided, *content)


def test_nothing_is_left_behind(servers: Servers) -> None:
    """Runs last: it ends the servers."""
    import psutil

    children = psutil.Process(servers.split.pid).children(recursive=True)
    assert len(children) >= 4 + ENCODERS  # the router; one child and one server for each instance
    servers.split.send_signal(signal.SIGINT)
    assert servers.split.wait(CONDITION_S) == 0
    assert "all processes have ended" in servers.log
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert orphans() <= servers.orphans_before
