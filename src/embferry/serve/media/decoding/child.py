"""A process that decodes, as its parent sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from PIL import Image

from embferry.protocol.text import shown
from embferry.serve.config import MediaSettings
from embferry.serve.errors import CODES, ServeError
from embferry.serve.media.decoding import messages
from embferry.serve.media.decoding.messages import Done, Job, Picture, Refused, Task

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""Seconds within which a new process must be ready."""
PIXEL_BYTES = 4
"""Bytes of a pixel in memory: Pillow keeps three in four."""
CLOCK_FACTOR = 4
"""Seconds by the clock for each second of processor time: other processes need the processor too."""


class BrokenChildError(Exception):
    """The process has ended, or does not keep the protocol. It is of no more use."""


class Child:
    """One process. Used by one thread at a time; :meth:`kill` may be called from any.

    Args:
        module: what the process runs.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, module: str = "embferry.serve.media.decoding.process") -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Nothing of our environment: it may hold keys, and a decoder needs none of it.
            environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            if "LD_LIBRARY_PATH" in os.environ:
                environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
            except BaseException:
                ours.close()
                raise
        self._sock = ours
        self._is_ready = self._is_working = self._is_killed = False
        self.jobs = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether the process lives and has finished its jobs."""
        return not (self._is_working or self._is_killed) and self._process.poll() is None

    def kill(self) -> None:
        """Ends the process at once, for good. A thread that waits for its answer gets a BrokenChildError."""
        self._is_killed = True
        self._process.kill()

    def close(self) -> None:
        """Ends the process and waits for its end."""
        self.kill()
        self._sock.close()
        self._process.wait()

    def run(
        self,
        task: Task,
        files: Sequence[bytes],
        limits: MediaSettings,
        fps: float | None,
        grow: Callable[[int], object] = lambda nbytes: None,
    ) -> Iterator[tuple[Image.Image, int] | Done]:
        """Does a job. Yields the pictures, each with the number of times that it is shown, and last Done.

        ``grow`` is called with the bytes that a picture takes in memory, before it is received.

        Raises:
            ServeError: the file is refused, or ``grow`` has raised it.
            BrokenChildError: the process has ended, or has to be: the job takes too much memory or time.
        """
        self._wait_until_ready()
        is_picture = task in ("check_image", "decode_image")
        seconds = limits.image_decode_timeout if is_picture else limits.video_decode_timeout
        deadline = time.monotonic() + CLOCK_FACTOR * seconds
        sizes = [len(file) for file in files]
        job = Job(task, limits.model_dump_json(), sizes, fps, limits.decode_memory, seconds)
        self.jobs += 1
        self._is_working = True
        try:
            self._sock.settimeout(CLOCK_FACTOR * seconds)
            messages.send(self._sock, job)
            for file in files:
                self._sock.sendall(file)
            while True:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
                answer = messages.receive_answer(self._sock)
                self._is_working = isinstance(answer, Picture)
                if isinstance(answer, Refused):
                    raise _refusal(answer, limits)
                if isinstance(answer, Done):
                    yield answer
                    return
                _check(answer, task, limits)
                grow(PIXEL_BYTES * answer.width * answer.height)
                yield self._picture(answer.width, answer.height), answer.times
        except TimeoutError as error:
            raise BrokenChildError(f"it took longer than {CLOCK_FACTOR * seconds:g} seconds") from error
        except (EOFError, OSError) as error:
            raise BrokenChildError(self._end(seconds)) from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise BrokenChildError(f"the decoder sent nonsense: {shown(error)}") from error

    def _picture(self, width: int, height: int) -> Image.Image:
        picture = Image.new("RGB", (width, height), None)
        for top, rows in messages.bands(width, height):
            pixels = messages.receive_bytes(self._sock, 3 * width * rows)
            picture.paste(Image.frombuffer("RGB", (width, rows), pixels, "raw", "RGB", 0, 1), (0, top))
        return picture

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        self._sock.settimeout(START_SECONDS)
        try:
            messages.receive_bytes(self._sock, len(messages.READY))
        except (OSError, EOFError) as error:
            if self._is_killed:
                raise BrokenChildError(self._end(0)) from error
            log.error("a process for decoding does not start", extra={"reason": self._end(0)})
            why = "no process for decoding could be started; try again later"
            raise ServeError("capacity_exhausted", why, status=503, retryable=True) from error
        self._is_ready = True

    def _end(self, seconds: float) -> str:
        """Returns why the process has ended."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "the decoder closed its connection"
        if status == -signal.SIGXCPU:
            return f"it needs more than {seconds:g} seconds of processor time"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"the decoder was ended by {signal.Signals(-status).name}"
        return f"the decoder ended with status {status}"


def _check(picture: Picture, task: Task, limits: MediaSettings) -> None:
    """Checks what a process says of a picture: a broken one may say anything."""
    most = limits.max_pixels if task == "decode_image" else min(limits.max_pixels, limits.max_video_pixels)
    if not (picture.width > 0 and picture.height > 0 and picture.width * picture.height <= most):
        raise ValueError(f"a picture of {picture.width} × {picture.height} pixels")
    if not 0 < picture.times <= limits.max_video_frames:
        raise ValueError(f"a frame that is shown {picture.times} times")


def _refusal(answer: Refused, limits: MediaSettings) -> ServeError:
    if answer.code == "capacity_exhausted":  # the memory of the job
        why = f"decoding needs more than {limits.decode_memory:,} bytes of memory (media.decode_memory)"
        return ServeError("media_decoder_failed", why)
    return ServeError(answer.code if answer.code in CODES else "media_decoder_failed", answer.detail)
