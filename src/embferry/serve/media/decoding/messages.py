"""The messages between a process that decodes and its parent: MessagePack with a length before it, over a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Literal

import msgspec

READY = b"R"
"""Sent by the process once, when it can take a job."""
MAX_MESSAGE = 4 << 20
"""Bytes of a message, files and pixels excluded."""
PIECE = 1 << 20
"""Bytes of pixels that are sent at a time, about: whole rows."""

Task = Literal["check_image", "check_video", "check_frames", "decode_image", "decode_video", "decode_frames"]


class Job(msgspec.Struct, frozen=True):
    """A job; its files follow.

    Attributes:
        limits: the settings of section ``media``, as JSON.
        sizes: the bytes of each file.
        fps: frames a second, for videos.
        memory: bytes that the process may reserve for the job.
        cpu_seconds: processor time that it may take.
    """

    task: Task
    limits: str
    sizes: list[int]
    fps: float | None
    memory: int
    cpu_seconds: float


class Picture(msgspec.Struct, frozen=True, tag=True):
    """A decoded picture or frame, shown ``times`` times; its pixels follow, three bytes each."""

    width: int
    height: int
    times: int = 1


class Done(msgspec.Struct, frozen=True, tag=True):
    """The job is done. ``fps``: frames a second of what was decoded."""

    fps: float = 0.0


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The file is refused, with an error of :mod:`embferry.serve.errors`."""

    code: str
    detail: str


Answer = Picture | Done | Refused
_JOBS = msgspec.msgpack.Decoder(Job)
_ANSWERS = msgspec.msgpack.Decoder(Answer)


def send(sock: socket.socket, message: Job | Answer) -> None:
    """Sends a message."""
    content = msgspec.msgpack.encode(message)
    sock.sendall(len(content).to_bytes(4) + content)


def receive_job(sock: socket.socket) -> Job:
    """Returns the next job. Raises EOFError at the end, and what msgspec raises."""
    return _JOBS.decode(_content(sock))


def receive_answer(sock: socket.socket) -> Answer:
    """Returns the next answer. Raises EOFError at the end, and what msgspec raises."""
    answer: Answer = _ANSWERS.decode(_content(sock))
    return answer


def receive_bytes(sock: socket.socket, count: int) -> bytearray:
    """Returns exactly ``count`` bytes. Raises EOFError if there are less."""
    content = bytearray(count)
    receive_into(sock, memoryview(content))
    return content


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Fills ``view``. Raises EOFError if there are not enough bytes."""
    while view:
        received = sock.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]


def bands(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yields the first row and the number of rows of each piece of a picture's pixels."""
    rows = max(1, PIECE // (3 * width))
    for top in range(0, height, rows):
        yield top, min(rows, height - top)


def _content(sock: socket.socket) -> bytearray:
    size = int.from_bytes(receive_bytes(sock, 4))
    if size > MAX_MESSAGE:
        raise ValueError(f"a message of {size:,} bytes")
    return receive_bytes(sock, size)
