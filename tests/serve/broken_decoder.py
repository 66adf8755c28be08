"""A process for decoding whose files say what the decoder does: ``b"segfault"`` and so on."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
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
        bytearray(limits.decode_memory)
    elif word == "much memory":
        kept = []
        while True:
            kept.append(b"x" * (1 << 20))
    elif word == "write":
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    elif word == "recursion":
        return _decode(data, limits)
    elif word in ("SystemExit", "KeyboardInterrupt", "RuntimeError", "AssertionError"):
        raise getattr(__import__("builtins"), word)("n" * 100_000 + "\n")
    return Image.new("RGB", (2, 3), "red")


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
