"""Encoders and a language server's side of the plug-in in one process, without SGLang."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np

from embferry.connectors.sglang.encoder_side import EncoderSide
from embferry.connectors.sglang.encoders import Description
from embferry.connectors.sglang.incoming import IncomingPart
from embferry.connectors.sglang.language_side import LanguageSide
from embferry.connectors.sglang.outgoing import OutgoingPart, Rows
from embferry.connectors.sglang.parts import Content, Destination, EncoderInfo, PartId, Source
from embferry.connectors.sglang.request_trace import RequestTrace
from embferry.connectors.sglang.settings import PluginSettings
from embferry.connectors.shared.shape import Shape, digest_of

T = TypeVar("T")
TOKENS, WIDTH = 200, 16
SHAPE = Shape(TOKENS, WIDTH, "float32")
NAME = "ab" * 16
WAIT_S = 60.0
SETTINGS = PluginSettings(transports=("tcp",), num_blocks=2, block_size=8, encoder_timeout=10.0, failover_timeout=30.0)
"""No encoder is lost by its silence here."""


def rows_of(seed: int) -> Rows:
    """Returns an embedding as bytes."""
    return np.random.default_rng(seed).standard_normal((TOKENS, WIDTH), np.float32).view(np.uint8)


class LoopThread:
    """An event loop on a thread of its own, as an encoder has one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        """Runs a coroutine, and returns its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class StubEncoder:
    """The plug-in's side of an encoder."""

    def __init__(self, url: str = "http://e:1") -> None:
        self.url = url
        self.side = EncoderSide(SETTINGS, {"IMAGE": WIDTH}, "float32")
        self.loop = LoopThread()

    @property
    def info(self) -> EncoderInfo:
        """Its description of itself."""
        return msgspec.json.decode(self.side.describe(), type=Description).kinds["IMAGE"]

    def source(self, attempt: int = 0) -> Source:
        """Names this encoder as the source of the part."""
        return Source(NAME, 0, attempt, self.url, self.info)

    def part(self, attempt: int = 0) -> OutgoingPart:
        """Returns the part as this encoder has it."""
        return self.side.parts.get(PartId("rid", NAME, 0, attempt))

    def encode(self, seed: int, attempt: int = 0, before: Content | None = None) -> Content:
        """Encodes the part for one rank, and begins to send it."""
        part = self.part(attempt)
        part.add(Destination(part.part.text, "h:1", 1, 0, True, before))
        part.announce(SHAPE)
        part.encoded(SHAPE, rows_of(seed), digest_of(rows_of(seed), SHAPE).hex())
        assert part.content is not None
        self.sending = self.loop.start(part.send("h:1"))
        return part.content

    def close(self) -> None:
        self.side.close()
        self.loop.close()


@contextmanager
def both_sides(
    encoders: int = 1, trace: RequestTrace | None = None
) -> Iterator[tuple[IncomingPart, list[StubEncoder], LanguageSide]]:
    """Makes encoders, and a part that a language server waits for. ``trace``: of the part, if it has spans."""
    made = [StubEncoder(f"http://e:{n}") for n in range(encoders)]
    language = LanguageSide(SETTINGS, rank=0, ranks=1, hosts=1)
    incoming = language.incoming("rid", trace)
    try:
        yield incoming, made, language
    finally:
        incoming.close()
        language.close()
        for encoder in made:
            encoder.close()


def wait_complete(incoming: IncomingPart) -> None:
    """Waits until a part is complete."""
    deadline = time.monotonic() + WAIT_S
    while not incoming.poll():
        assert time.monotonic() < deadline
        time.sleep(0.01)
