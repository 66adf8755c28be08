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

import numpy as np

from embferry import Field, Geometry, KVPoll, Layout, ReceiveManager, SendManager, TcpTransport, as_fields
from embferry.testing.proxy import ChaosProxy

TOKENS, WIDTH, ROOM = 4096, 256, 7
CUTS, CUT_AFTER, BYTES_PER_S = 3, 1 << 20, 2 << 20
POOL_BLOCKS, BLOCK_TOKENS = 64, 8
LISTENS_AT, PROXY_AT = "127.0.0.1", "127.0.0.2"
BAR = 30
REDRAWN_S = 0.05


def show(say: Callable[[str, str], None]) -> bool:
    """Transfers an embedding and draws it as it arrives; returns whether every byte has.

    Args:
        say: prints a text, then an end. A terminal gets a bar that grows, anything else a line for each cut.
    """
    layout = Layout((Field("input_embeddings", "float32", WIDTH),))
    embedding = np.random.default_rng(0).standard_normal((TOKENS, WIDTH), np.float32)
    encode_side = SendManager(layout, [TcpTransport()])
    sender = encode_side.open(ROOM)
    sender.init(total_tokens=TOKENS, content_digest=b"the same bytes, the same digest")
    sender.send_embedding(as_fields({"input_embeddings": embedding}))
    cutting = {"cut_after": CUT_AFTER, "toward": "upstream", "times": CUTS, "bytes_per_s": BYTES_PER_S}
    try:
        with ChaosProxy(listen=(PROXY_AT, 0), **cutting) as proxy:  # type: ignore[arg-type]  # of several types
            proxy.upstream = proxy.port  # at another address
            transport = TcpTransport(host=LISTENS_AT, port=proxy.port, advertise=PROXY_AT)
            language_side = ReceiveManager(Geometry(layout, POOL_BLOCKS, BLOCK_TOKENS), [transport])
            try:
                receiver = language_side.open(ROOM, encode_side.endpoint)
                receiver.init()
                cuts = 0
                while receiver.poll() not in (KVPoll.Success, KVPoll.Failed):
                    arrived = receiver.transferred_tokens
                    if proxy.cuts > cuts:
                        cuts += 1
                        say(f"{bar(arrived)}  the connection is cut", "\n")
                    elif sys.stdout.isatty():
                        say(bar(arrived), "\r")
                    time.sleep(REDRAWN_S)
                while cuts < proxy.cuts:
                    cuts += 1
                    say(f"{bar(receiver.transferred_tokens)}  the connection was cut", "\n")
                if receiver.poll() == KVPoll.Failed:
                    receiver.failure_exception()
                found = receiver.arrays()["input_embeddings"].view(np.float32)
                equal = bool(np.array_equal(found, embedding))
                say(f"{bar(len(found))}  {'every byte is the same' if equal else 'BYTES DIFFER'}", "\n")
                receiver.clear()
                return equal and proxy.cuts == CUTS
            finally:
                language_side.close()
    finally:
        encode_side.close()


def bar(arrived: int) -> str:
    """Returns a bar, and the number of tokens that have arrived."""
    full = round(BAR * arrived / TOKENS)
    return f"  {'█' * full}{'░' * (BAR - full)} {arrived:>5,} of {TOKENS:,} tokens"


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    sys.exit(0 if show(lambda text, end: print(text, end=end, flush=True)) else 1)
