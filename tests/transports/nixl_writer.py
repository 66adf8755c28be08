"""A sender in a process of its own that fills blocks again and again: ``nixl_writer.py HANDLE EPOCH BLOCKS``.

Four writes are in flight at any time. It prints whether the first that fails may be retried, and
ends when it reads a line.
"""

from __future__ import annotations

import sys
import threading

from embferry.memory.buffers import source_pieces
from embferry.testing.pair import LARGE, embedding
from embferry.transports.contract import Written
from embferry.transports.leased.nixl import NixlTransport

IN_FLIGHT = 4


def main() -> None:
    handle, epoch, count = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    blocks = tuple(range(count))
    tokens = count * LARGE.block_size
    pieces = source_pieces(LARGE, embedding(LARGE.layout, tokens), 0, tokens, blocks, 0)
    woken = threading.Event()
    transport = NixlTransport(woken.set)
    transport.connect(handle)
    for ticket in range(IN_FLIGHT):
        transport.write(handle, epoch, blocks, pieces, ticket)
    while True:
        assert woken.wait(60)
        woken.clear()
        for event in transport.poll():
            if isinstance(event, Written):
                if event.error is not None:
                    print(f"retryable {event.error.retryable}", flush=True)
                    sys.stdin.readline()
                    transport.close()
                    return
                transport.write(handle, epoch, blocks, pieces, event.ticket)


main()
