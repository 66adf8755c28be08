"""A sender over shm that pauses within a write: ``shm_writer.py HANDLE EPOCH BLOCK``.

It copies half of the first piece, prints ``inside`` and waits for a line on standard input. Then it completes the copy
and prints ``written`` or the error's code.
"""

from __future__ import annotations

import sys
import threading
from typing import Any
from unittest import mock

import numpy as np

from embferry.memory.buffers import source_pieces
from embferry.testing.pair import LAYOUT, SMALL, embedding
from embferry.transports.contract import Written
from embferry.transports.shm import ShmTransport

real_copyto = np.copyto


def copy_in_two_halves(to: Any, source: Any) -> None:
    half = source.size // 2
    real_copyto(to[:half], source[:half])
    print("inside", flush=True)
    sys.stdin.readline()
    real_copyto(to[half:], source[half:])


def main() -> None:
    handle, epoch, block = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    woken = threading.Event()
    transport = ShmTransport(woken.set)
    transport.connect(handle)
    pieces = source_pieces(SMALL, embedding(LAYOUT, 5), 0, 5, (block,), 0)
    with mock.patch("embferry.transports.shm.transport.np.copyto", copy_in_two_halves):
        transport.write(handle, epoch, (block,), pieces[:1], 1)
        assert woken.wait(60)
    (event,) = transport.poll()
    assert isinstance(event, Written)
    print("written" if event.error is None else event.error.code, flush=True)
    transport.close()


main()
