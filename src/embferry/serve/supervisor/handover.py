"""Settings on their way into a child: one line of JSON through its standard input, where no ``ps`` shows them."""

from __future__ import annotations

import json
import os

from embferry.serve.config import Settings
from embferry.serve.supervisor.slot import ProcessRole, Program

MAX_LINE_BYTES = 1 << 20


def pack(settings: Settings) -> bytes:
    """The settings with the API key in clear, which their own JSON leaves out."""
    said = settings.model_dump(mode="json")
    if settings.router.api_key is not None:
        said["router"]["api_key"] = settings.router.api_key.get_secret_value()
    return json.dumps(said).encode() + b"\n"


def settled_child(role: ProcessRole, settings: Settings) -> Program:
    """A process of this project, told all its settings: :mod:`.child`."""
    return Program(("-m", "embferry.serve.supervisor.child", role), pack(settings))


def unpack(line: bytes) -> Settings:
    return Settings.model_validate(json.loads(line))


def read_line(fd: int) -> bytes:
    """One line from a descriptor, without buffering anything behind it. Raises EOFError if it ends before."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1 << 16)
        if not byte or len(line) > MAX_LINE_BYTES:
            raise EOFError("the parent has gone before it said what to do")
        line += byte
    return bytes(line)
