"""Log lines that never block: a bounded queue, and a thread that writes it to a descriptor.

A pipe without a reader, or a stopped terminal, accepts no more bytes. A process that writes its log itself then stands
still, with the locks that it holds. Here only the writing thread stands still. Lines beyond the bounds are dropped and
counted; their number precedes the next line that is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque

MAX_LINES = 10_000
MAX_BYTES = 8 << 20
MAX_LINE_BYTES = 64 << 10
"""Bytes of one line; a longer one is cut."""
FLUSH_SECONDS = 1.0
"""Seconds that the end of the process waits for the lines that are left."""


class QueueHandler(logging.Handler):
    """Writes to a descriptor, on a thread of its own that begins with the first line.

    Args:
        fd: the descriptor, which stays open.

    Attributes:
        dropped: lines so far that were not written.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.dropped = 0
        self._fd = fd
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begins anew, also in a forked child, which has no copy of the thread."""
        self._lines: deque[bytes] = deque()
        self._nbytes = self._dropped_since = 0
        self._changed = threading.Condition(threading.Lock())
        self._writing = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        except Exception:  # noqa: BLE001 - a value that cannot be shown, for example
            self.handleError(record)
            return
        if len(line) > MAX_LINE_BYTES:
            line = line[:MAX_LINE_BYTES] + b"... (cut)\n"
        with self._changed:
            if len(self._lines) >= MAX_LINES or self._nbytes + len(line) > MAX_BYTES:
                self.dropped += 1
                self._dropped_since += 1
                return
            self._lines.append(line)
            self._nbytes += len(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="embferry-log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are written, for ``FLUSH_SECONDS`` at most."""
        until = time.monotonic() + FLUSH_SECONDS
        with self._changed:
            while (self._lines or self._writing) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines:
                    self._changed.wait()
                data, self._writing = self._take(), True
            with contextlib.suppress(OSError):  # the reader has gone, or the disk is full
                self._write(data)
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # the descriptor was set so, for example by the parent
                select.select([], [self._fd], [])

    def _take(self) -> bytes:
        """Returns the next line, with the number of those dropped before it if there are any."""
        line = self._lines.popleft()
        self._nbytes -= len(line)
        dropped, self._dropped_since = self._dropped_since, 0
        if dropped:
            line = b"%d log lines were dropped: the log was not read, or was too long\n" % dropped + line
        return line
