"""A connection that is cut three times while an embedding is transferred: it goes on where it stopped.

Everything runs in this process: an encode side, a language side, and between them a proxy that lets two megabytes
through in a second and cuts the connection after each of the first three megabytes. The exit status is 0 if every byte
has arrived.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np

from embferry import (
    EmbeddingReceiver,
    Field,
    Geometry,
    KVPoll,
    Layout,
    ReceiveManager,
    SendManager,
    TcpTransport,
    as_fields,
)
from embferry.testing.proxy import ChaosProxy

TOKENS, WIDTH, ROOM = 4096, 256, 7
CUTS, CUT_AFTER, BYTES_PER_S = 3, 1 << 20, 2 << 20
POOL_BLOCKS, BLOCK_TOKENS = 64, 8
LISTENS_AT, PROXY_AT = "127.0.0.1", "127.0.0.2"
BAR = 30
REDRAWN_S = 0.05

Say = Callable[[str, str], None]
"""Prints a text, then an end."""


def show(say: Say) -> bool:
    """Transfers an embedding and draws it as it arrives; returns whether every byte has.

    Raises:
        EmbeddingTransferError: the transfer failed.
    """
    layout = Layout((Field("input_embeddings", "float32", WIDTH),))
    embedding = np.random.default_rng(0).standard_normal((TOKENS, WIDTH), np.float32)
    with ExitStack() as used:
        encode_side = used.enter_context(closing(SendManager(layout, [TcpTransport()])))
        sender = encode_side.open(ROOM)
        sender.init(total_tokens=TOKENS, content_digest=b"the same bytes, the same digest")
        sender.send_embedding(as_fields({"input_embeddings": embedding}))

        proxy = used.enter_context(
            ChaosProxy(
                listen=(PROXY_AT, 0), cut_after=CUT_AFTER, toward="upstream", times=CUTS, bytes_per_s=BYTES_PER_S
            )
        )
        proxy.upstream = proxy.port  # at another address
        transport = TcpTransport(host=LISTENS_AT, port=proxy.port, advertise=PROXY_AT)
        geometry = Geometry(layout, POOL_BLOCKS, BLOCK_TOKENS)
        language_side = used.enter_context(closing(ReceiveManager(geometry, [transport])))
        receiver = language_side.open(ROOM, encode_side.endpoint)
        receiver.init()
        watch(receiver, proxy, say)
        arrived = receiver.arrays()["input_embeddings"].view(np.float32)
        is_equal = bool(np.array_equal(arrived, embedding))
        say(f"{bar(len(arrived))}  {'every byte is the same' if is_equal else 'BYTES DIFFER'}", "\n")
        receiver.clear()
        return is_equal and proxy.cuts == CUTS


def watch(receiver: EmbeddingReceiver, proxy: ChaosProxy, say: Say) -> None:
    """Draws until everything has arrived: a line for each cut, and on a terminal a bar that grows."""
    cuts = 0
    while True:
        state = receiver.poll()
        if state == KVPoll.Failed:
            raise receiver.failure_exception()
        drawn = bar(receiver.transferred_tokens)
        if cuts < proxy.cuts:
            cuts += 1
            say(f"{drawn}  the connection is cut", "\n")
        elif state == KVPoll.Success:
            return
        elif sys.stdout.isatty():
            say(drawn, "\r")
        time.sleep(REDRAWN_S)


def bar(arrived: int) -> str:
    """Returns a bar, and the number of tokens that have arrived."""
    full = round(BAR * arrived / TOKENS)
    return f"  {'█' * full}{'░' * (BAR - full)} {arrived:>5,} of {TOKENS:,} tokens"


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    sys.exit(0 if show(lambda text, end: print(text, end=end, flush=True)) else 1)
