"""Whether a worker encodes at all, by an encode of a tiny picture of its own.

A picture may be to blame for a failed encode, or the worker: its memory, its device, its decoder. The picture here is
beyond doubt. It goes the way of all pictures, decoder and vision encoder, without the cache.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from PIL import Image

from embferry.engine.media import MediaProcessor, PreparedItem
from embferry.protocol.text import printable
from embferry.serve.config import MediaSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.encode.preparation import prepare_item
from embferry.serve.shared_threads import SharedThreads

log = logging.getLogger(__name__)

FRESH_SECONDS = 10.0
"""How long a successful encode counts."""
WAIT_SECONDS = 5.0
"""Seconds to wait for a test, for which a decoder may have to start. A worker that is busy is not in trouble."""
_CLIENT = "self-test"
_SIDE = 56


class SelfTest:
    """The tests of one worker, one at a time. Thread-safe.

    Args:
        media: cuts the picture for the model.
        limits: the time and the memory that decoding may take.
        threads: those that decode.
        wake: wakes the encoder thread.

    Attributes:
        trouble: why encodes fail; None while they succeed, or have not been tried.
    """

    def __init__(
        self, media: MediaProcessor, limits: MediaSettings, threads: SharedThreads, wake: Callable[[], None]
    ) -> None:
        limited = {name: getattr(limits, name) for name in ("decode_memory", "image_decode_timeout")}
        self._limits = MediaSettings(**limited)
        self._media, self._threads, self._wake = media, threads, wake
        self._lock = threading.Lock()
        self._running: Future[None] | None = None
        self._prepared: PreparedItem | None = None
        self._succeeded_at = float("-inf")
        self.trouble: str | None = None

    @property
    def is_due(self) -> bool:
        """Whether no encode has succeeded lately."""
        return self.trouble is not None or time.monotonic() - self._succeeded_at > FRESH_SECONDS

    def succeeded(self) -> None:
        """Notes that an encode has succeeded."""
        self._succeeded_at = time.monotonic()
        if self.trouble is not None:
            log.info("encodes succeed again")
        self.trouble = None

    def begin(self) -> Future[None]:
        """Begins a test unless one runs. Returns a future that is done when the test ends."""
        with self._lock:
            if self._running is not None:
                return self._running
            running = self._running = Future()
        work = self._threads.submit(_CLIENT, self._decode)
        work.add_done_callback(lambda done: self._end(self.trouble) if done.cancelled() else None)
        return running

    async def result(self) -> str | None:
        """Returns why encodes fail, after a test of ``WAIT_SECONDS`` at most; None if they succeed."""
        await asyncio.wait({asyncio.ensure_future(_done(self.begin()))}, timeout=WAIT_SECONDS)
        return self.trouble

    def run(self, encode: Callable[[PreparedItem], object]) -> bool:
        """Encodes the picture if a test has decoded it. Returns whether it has. Called on the encoder thread."""
        with self._lock:
            prepared, self._prepared = self._prepared, None
        if prepared is None:
            return False
        try:
            encode(prepared)
        except Exception as error:  # noqa: BLE001 - any error is the result of the test
            self._end(_reason("the vision encoder fails", error))
        else:
            self.succeeded()
            self._end(None)
        return True

    def _decode(self) -> None:
        try:
            prepared = prepare_item(EncodeItem("image", _picture()), self._media, self._limits)
        except Exception as error:  # noqa: BLE001 - likewise
            self._end(_reason("the decoder fails", error))
            return
        with self._lock:
            self._prepared = prepared
        self._wake()

    def _end(self, trouble: str | None) -> None:
        with self._lock:
            running, self._running = self._running, None
        if trouble is not None and self.trouble is None:
            log.error("encodes fail, also that of a test picture, so requests are refused: %s", trouble)
        self.trouble = trouble
        if running is not None:
            running.set_result(None)


async def _done(future: Future[None]) -> None:
    await asyncio.wait({asyncio.wrap_future(future)})


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), "grey").save(buffer, "PNG")
    return buffer.getvalue()


def _reason(what: str, error: Exception) -> str:
    return printable(f"{what}: {type(error).__name__}: {error}", 300)
