"""Questions about pictures and videos, and many clients that ask them at once."""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from embferry.serve.config import Settings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.undivided import Undivided, UndividedAnswer
from tests.serve.pictures import data_url, encoded, noise
from tests.serve.workers.test_processes import long_video

BOUND = 240.0
"""Seconds within which a request has to end; one that takes longer counts as hanging."""
TEXT, TOKENS = "what is there?", 8


@dataclass(frozen=True)
class Question:
    """A question about a picture or a video, and the answer of one process that has the whole model."""

    part: dict[str, Any]
    expected: UndividedAnswer

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        content = [self.part, {"type": "text", "text": TEXT}]
        messages = [{"role": "user", "content": content}]
        return {"model": "shapes", "messages": messages, "max_tokens": TOKENS, "stream": stream}


def questions(settings: Settings) -> list[Question]:
    """Returns questions with embeddings of different lengths, the longest first."""
    undivided = Undivided(settings)
    pictures = [encoded(noise(*size)) for size in ((96, 64), (200, 150), (320, 240))]
    media = [long_video(96), *({"type": "image_url", "image_url": {"url": data_url(data)}} for data in pictures)]
    return [Question(part, undivided.answer([_item(part)], TEXT, TOKENS)) for part in media]


def _item(part: dict[str, Any]) -> EncodeItem:
    _, *files = part[part["type"]]["url"].split(",")
    data = [base64.b64decode(file) for file in files]
    return EncodeItem("image", data[0]) if part["type"] == "image_url" else EncodeItem("video", frames=data, fps=2)


def ask(url: str, question: Question, *, stream: bool = False) -> tuple[str, str]:
    """Asks once. Returns what is wrong with the answer, empty if nothing is, and the id of its request."""
    try:
        response = httpx.post(
            f"{url}/v1/chat/completions", json=question.body(stream=stream), timeout=BOUND, trust_env=False
        )
        request_id = response.headers.get("x-request-id", "")
        if response.status_code != 200:
            return f"{response.status_code}: {response.text}", request_id
        answer = _last(response.text) if stream else response.json()
        tokens = answer["embferry"]["tokens"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        return repr(error), ""
    right = list(question.expected.tokens)
    return ("" if tokens == right else f"{tokens} in place of {right}"), request_id


def _last(stream: str) -> Any:
    """Returns the last chunk of a stream that has a choice."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events[-1] == "[DONE]", events[-1]
    return next(chunk for chunk in map(json.loads, reversed(events[:-1])) if chunk.get("choices"))


@dataclass
class Asking:
    """Clients that ask. ``wrong``: what was wrong with the answers that there are so far; ``count``: their number."""

    wrong: list[str] = field(default_factory=list)
    count: int = 0


@contextmanager
def asking(url: str, asked: list[Question], clients: int) -> Iterator[Asking]:
    """Keeps asking from so many clients within the block. At its end every request has ended."""
    numbers, ending, found, lock = itertools.count(), threading.Event(), Asking(), threading.Lock()

    def run() -> None:
        while not ending.is_set():
            number = next(numbers)
            wrong, _ = ask(url, asked[number % len(asked)], stream=number % 2 == 1)
            with lock:
                found.count += 1
                found.wrong += [wrong] if wrong else []

    threads = [threading.Thread(target=run, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        ending.set()
        for thread in threads:
            thread.join(BOUND + 5)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
