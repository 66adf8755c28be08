"""The common part of all engines' comparisons: the fields of a configuration, sizes, and free ports."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from typing import Literal

import msgspec

MODEL = "tiny"
MAX_MODEL_LEN = 12288
"""Holds nine pictures of 1,280 tokens, the question and the answer."""
BLOCK_TOKENS = 16
TOKEN_BYTES = 1024
"""An embedding of the tiny model: 256 values of float32 a token."""
POOL_BYTES, SMALL_POOL_BYTES = 64 << 20, 64 << 10
PORTS = (15_000, 32_000)

Damage = Literal[
    "",
    "corrupted",
    "killed",
    "small pool",
    "stopped",
    "damaged picture",
    "client hangs up",
    "id used again",
    "two ranks",
]
"""The damage that is done in a scenario, or the way in which servers are started for it."""


class Configuration(msgspec.Struct, frozen=True):
    name: str
    title: str
    connector: str
    """The engine's own name for its transfer of embeddings, or ``embferry``; empty for one engine, undivided."""
    transport: str = ""
    """The transport, if the connector is embferry's."""
    overlap: str = ""
    """The router's ``vllm.overlap``, if it is not the default."""
    on_request: bool = False
    """Compared only if the user names it."""


ENCODERS, LANGUAGE, SMALL = ("encoder 1", "encoder 2"), "language", "language, small pool"
"""Names of the servers of a divided configuration."""


def free_ports(count: int) -> list[int]:
    """Returns free ports below those that the kernel gives to connections, which may be taken at any time."""
    held: list[socket.socket] = []
    for port in random.sample(range(*PORTS), 1000):
        with suppress(OSError):
            held.append(socket.create_server(("127.0.0.1", port)))
        if len(held) == count:
            break
    numbers = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return numbers


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
