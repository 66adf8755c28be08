"""A process for decoding whose files say what the decoder does: ``b"segfault"`` and so on."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.media.decoding import messages, process
from embferry.serve.media.decoding.messages import Done, Picture


def _decode(data: bytes, limits: MediaSettings) -> Image.Image:
    word = bytes(data).decode()
    if word == "segfault":
        ctypes.string_at(0)
    elif word == "abort":
        os.abort()
    elif word == "exit":
        os._exit(0)
    elif word == "hang":
        time.sleep(3600)
    elif word == "spin":
        while True:
            pass
    elif word == "memory":
        bytearray(limits.decode_memory + (64 << 20))
    elif word == "much memory":
        kept = []
        while True:
            kept.append(b"x" * (1 << 20))
    elif word == "write":
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    elif word == "recursion":
        return _decode(data, limits)
    elif (act := word.partition(" "))[0] in ACTS:
        ACTS[act[0]](act[2])
    elif word in ("SystemExit", "KeyboardInterrupt", "RuntimeError", "AssertionError"):
        raise getattr(__import__("builtins"), word)("n" * 100_000 + "\n")
    return Image.new("RGB", (2, 3), "red")


def _udp(port: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", int(port)))


def _listen(port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        pass


ACTS: dict[str, Callable[[str], object]] = {
    "read": lambda path: Path(path).read_bytes(),
    "list": lambda path: os.listdir(os.path.dirname(path)),
    "truncate": lambda path: os.truncate(path, 0),
    "create": lambda path: os.mkfifo(path + ".fifo"),
    "remove": os.unlink,
    "execute": lambda path: os.posix_spawn(sys.executable, [sys.executable, "-V"], {}),
    "connect": lambda port: socket.create_connection(("127.0.0.1", int(port))).close(),
    "listen": _listen,
    "udp": _udp,
    "signal": lambda pid: os.kill(int(pid), 0),
}
"""Acts that a decoder may try when a file has taken it over, each with one argument."""


def _done(sock: Any, job: messages.Job, files: list[bytes]) -> Done:
    word = files[0].decode()
    if word == "nonsense":
        sock.sendall(b"\0\0\0\x04junk")
    elif word == "long message":
        sock.sendall(b"\xff" * 8)
    elif word == "large picture":
        messages.send(sock, Picture(100_000, 100_000))
    elif word == "no picture":
        messages.send(sock, Picture(0, 5))
    elif word == "often":
        messages.send(sock, Picture(1, 1, 1 << 40))
    elif word == "many":
        while True:
            process._send(sock, Image.new("RGB", (1, 1)), 1)
    elif word == "unfinished":
        messages.send(sock, Picture(1000, 1000))
    return _real_done(sock, job, files)


_real_done = process._done
process._done = _done
process.decode_image = _decode
process.check_image = _decode  # type: ignore[assignment]

if __name__ == "__main__":
    process.main(int(sys.argv[1]))
