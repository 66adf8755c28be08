"""Processes that are killed while they receive: the next one on the host goes on where the last one was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from embferry import EmbeddingSender, SendManager, wait
from embferry.transfer.fields import Fields
from embferry.transports.tcp.transport import TcpTransport
from tests.transfer.conftest import LAYOUT, SECONDS, embedding

from .receiving import SIZE
from .workers import names

pytestmark = pytest.mark.integration

TOKENS, BEFORE = 20 * SIZE, 7 * SIZE
DIGEST = b"the content"


class Receiving:
    """A language worker."""

    def __init__(self, place: Path) -> None:
        command = [sys.executable, "-m", "tests.kept.receiving", str(place)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.told() == {"begun": True}

    def ask(self, sender: EmbeddingSender, digest: bytes = DIGEST) -> list[list[int]]:
        """Has it receive an embedding. Returns the tokens that it has kept."""
        assert self._process.stdin is not None
        endpoint = sender.manager.endpoint  # type: ignore[attr-defined]
        print(endpoint, sender.room, digest.hex(), TOKENS, file=self._process.stdin, flush=True)
        return list(self.told()["kept"])

    def told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "it has ended"
        return dict(json.loads(line))

    def arrives(self, tokens: int) -> None:
        """Waits until so many tokens have arrived. No more are ready."""
        while (told := self.told()) != {"arrived": tokens}:
            assert "error" not in told, told

    def end(self) -> dict[str, Any]:
        """Waits for the end of a transfer, and has the worker be done with its rows."""
        while "sent" not in (told := self.told()):
            pass
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        assert self.told() == {"cleared": True}
        return told

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def start(place: Path) -> Iterator[Any]:
    """Yields a function that starts a language worker."""
    with ExitStack() as stack:

        def started() -> Receiving:
            receiving = Receiving(place)
            stack.callback(receiving.kill)
            return receiving

        yield started


@pytest.fixture
def sending() -> Iterator[SendManager]:
    manager = SendManager(LAYOUT, [TcpTransport()])
    yield manager
    manager.close()


@contextmanager
def offered(manager: SendManager, rows: Fields, ready: int, digest: bytes = DIGEST) -> Iterator[EmbeddingSender]:
    """Opens a room for an embedding, of which so many tokens have been produced."""
    sender = manager.open(_next_room())
    sender.init(TOKENS, digest)
    sender.send_embedding(rows, ready)
    yield sender
    sender.clear()


def _next_room(counter: list[int] = [0]) -> int:  # noqa: B006  (the numbers of all tests)
    counter[0] += 1
    return counter[0]


def digest_of(rows: Fields) -> str:
    return hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest()


def die_after(receiving: Receiving, sending: SendManager, rows: Fields, tokens: int) -> None:
    """Has a worker receive a part of an embedding, and kills it."""
    with offered(sending, rows, tokens) as sender:
        receiving.ask(sender)
        receiving.arrives(tokens)
        receiving.kill()


@pytest.mark.parametrize("which", ["the restarted one", "another one on the host"])
def test_the_next_worker_goes_on_where_a_killed_one_was(
    which: str, start: Any, sending: SendManager, place: Path
) -> None:
    rows = embedding(TOKENS)
    first = start()
    other = None if which == "the restarted one" else start()
    die_after(first, sending, rows, BEFORE)
    second = other or start()
    with offered(sending, rows, TOKENS) as sender:
        assert second.ask(sender) == [[0, BEFORE]]
        end = second.end()
        wait(sender, SECONDS)
        assert sender.sent_bytes == (TOKENS - BEFORE) * LAYOUT.token_bytes
    del end["transfers"]  # a grant is of one block or two, as they return to the pool
    assert end == {"error": None, "rows": digest_of(rows), "sent": TOKENS - BEFORE, "kept_tokens": BEFORE}
    assert names(place) == []


def test_a_whole_embedding_needs_no_transfer(start: Any, sending: SendManager, place: Path) -> None:
    """Its worker is killed before it has used the last row. The encoder need not run again."""
    rows = embedding(TOKENS)
    die_after(start(), sending, rows, TOKENS)
    second = start()
    with offered(sending, rows, 0) as sender:
        assert second.ask(sender) == [[0, TOKENS]]
        end = second.end()
        wait(sender, SECONDS)
        assert sender.sent_bytes == 0
    assert (end["rows"], end["sent"], end["transfers"]) == (digest_of(rows), 0, 0)
    assert names(place) == []


def test_killed_twice(start: Any, sending: SendManager, place: Path) -> None:
    rows = embedding(TOKENS)
    die_after(start(), sending, rows, BEFORE)
    die_after(start(), sending, rows, 2 * BEFORE)
    third = start()
    with offered(sending, rows, TOKENS) as sender:
        assert third.ask(sender) == [[0, 2 * BEFORE]]
        end = third.end()
    assert (end["rows"], end["sent"]) == (digest_of(rows), TOKENS - 2 * BEFORE)
    assert names(place) == []


def test_another_content_starts_at_the_first_token(start: Any, sending: SendManager, place: Path) -> None:
    """The encoder has another embedding under the digest for which the worker asked."""
    die_after(start(), sending, embedding(TOKENS), BEFORE)
    second, rows = start(), embedding(TOKENS, seed=1)
    with offered(sending, rows, TOKENS, digest=b"another content") as sender:
        assert second.ask(sender) == [[0, BEFORE]]
        end = second.end()
    assert (end["rows"], end["sent"], end["kept_tokens"]) == (digest_of(rows), TOKENS, 0)
    assert names(place) == []


def test_two_requests_for_the_same_content(start: Any, sending: SendManager, place: Path) -> None:
    """One goes on with the file of the killed worker, the other one has its own."""
    rows = embedding(TOKENS)
    die_after(start(), sending, rows, BEFORE)
    both = start(), start()
    with offered(sending, rows, BEFORE) as one, offered(sending, rows, BEFORE) as other:
        assert both[0].ask(one) == [[0, BEFORE]]
        assert both[1].ask(other) == []
        both[1].arrives(BEFORE)
        for sender in (one, other):
            sender.send_embedding(rows, TOKENS)
        ends = [each.end() for each in both]
    assert [end["rows"] for end in ends] == [digest_of(rows)] * 2
    assert [end["sent"] for end in ends] == [TOKENS - BEFORE, TOKENS]
    assert names(place) == []
