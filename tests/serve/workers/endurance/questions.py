"""Clients that keep asking about pictures and videos, and what became of their requests."""

from __future__ import annotations

import base64
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from embferry.serve.config import Settings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.undivided import Undivided, UndividedAnswer
from tests.serve.pictures import data_url
from tests.serve.workers.test_processes import image, long_video

BOUND = 60.0
"""Seconds within which a request has to end; one that takes longer counts as hanging."""
CLIENTS = 4
PAUSE = 0.2
"""Seconds between two requests of a client: a process that is started again needs the processor too."""
COINS = Path(__file__).parents[4] / "examples" / "media" / "coins.png"
TEXT, TOKENS = "How many circles are there?", 8


@dataclass(frozen=True)
class Question:
    """A question about a picture or a video, or about none."""

    parts: list[dict[str, Any]]
    expected: UndividedAnswer

    def body(self, stream: bool) -> dict[str, Any]:
        content = [*self.parts, {"type": "text", "text": TEXT}]
        messages = [{"role": "user", "content": content}]
        return {"model": "shapes", "messages": messages, "max_tokens": TOKENS, "stream": stream}


@dataclass(frozen=True)
class Outcome:
    """The end of one request. ``code``: empty for the right answer. Times in monotonic seconds."""

    begun: float
    ended: float
    code: str = ""
    detail: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def questions() -> list[Question]:
    """Returns the questions, with the answers of the undivided process."""
    undivided = Undivided(Settings())
    coins = {"type": "image_url", "image_url": {"url": data_url(COINS.read_bytes())}}
    media = [[long_video(48)], [image()], [long_video(32)], [coins], []]
    return [Question(parts, undivided.answer([*map(_item, parts)], TEXT, TOKENS)) for parts in media]


def _item(part: dict[str, Any]) -> EncodeItem:
    _, *files = part[part["type"]]["url"].split(",")
    data = [base64.b64decode(file) for file in files]
    return EncodeItem("image", data[0]) if part["type"] == "image_url" else EncodeItem("video", frames=data, fps=2)


@dataclass
class Clients:
    """Clients of one stack, on threads.

    Attributes:
        asked: the questions, asked in turn; every second time the answer is a stream.
        url: returns the URL of the router at the moment.
        transport: the transport over which every embedding has to travel.
    """

    asked: list[Question]
    url: Callable[[], str]
    transport: str

    @contextmanager
    def asking(self) -> Iterator[list[Outcome]]:
        """Keeps asking within the block. At its end the list holds every request."""
        numbers, ending, outcomes = itertools.count(), threading.Event(), list[Outcome]()

        def run() -> None:
            while not ending.wait(PAUSE):
                outcomes.append(self.ask(next(numbers)))

        threads = [threading.Thread(target=run, daemon=True) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield outcomes
        finally:
            ending.set()
        for thread in threads:
            thread.join(BOUND + 5)
        assert not any(thread.is_alive() for thread in threads), "a request hangs"

    def ask(self, number: int) -> Outcome:
        """Asks the question with this number."""
        question, stream = self.asked[number % len(self.asked)], number // len(self.asked) % 2 == 1
        begun = time.monotonic()
        try:
            url = f"{self.url()}/v1/chat/completions"
            response = httpx.post(url, json=question.body(stream), timeout=BOUND, trust_env=False, verify=False)
            code, detail = self._judge(question.expected, _last(response))
        except httpx.TimeoutException as error:
            code, detail = "hang", repr(error)
        except httpx.TransportError as error:
            code, detail = "connection", repr(error)
        except (ValueError, LookupError, TypeError) as error:
            code, detail = "malformed", f"{error!r}: {response.status_code} {response.text[-500:]}"
        return Outcome(begun, time.monotonic(), code, detail)

    def _judge(self, expected: UndividedAnswer, last: dict[str, Any]) -> tuple[str, str]:
        if "error" in last:
            return last["error"]["code"], last["error"]["message"]
        told = last["embferry"]
        travelled = told["transfer"] or {"total_tokens": 0, "transport": self.transport}
        facts = tuple(told["tokens"]), travelled["total_tokens"], travelled["transport"]
        right = facts == (expected.tokens, expected.visual_tokens, self.transport)
        return ("", "") if right else ("wrong", f"{facts} instead of {expected}")


def _last(response: httpx.Response) -> dict[str, Any]:
    """Returns the body, or of a stream the event with the end of the answer or an error."""
    if "event-stream" not in response.headers["content-type"]:
        return dict(response.json())
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    last = next(event for event in events if "error" in event or "embferry" in event)
    if "error" not in last and lines[-1] != "[DONE]":
        raise ValueError("the stream has no end")
    return dict(last)
