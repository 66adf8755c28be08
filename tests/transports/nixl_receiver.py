"""A receiver in a process of its own, whose engine runs only when nothing else of the process wants to.

So bytes that a sender leaves in flight stay in flight, and would be stored as late as possible. The process prints its
handle, then ``receiving``. It reads a line, ``revoke`` or ``close_blocks``, does that, fills the region with canaries
once it may, and prints how many bytes changed afterwards.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.testing.pair import CANARY, LARGE, Endpoint, eventually
from embferry.transports.contract import Window
from embferry.transports.leased.nixl import NixlTransport

BLOCKS = tuple(range(LARGE.num_blocks))


def hold_back_the_engine() -> None:
    own = {thread.native_id for thread in threading.enumerate()}
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {min(os.sched_getaffinity(0))})
        if thread not in own:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    region = MultimodalDataBuffers(LARGE, shared=False)
    bytes_ = np.frombuffer(region.view, np.uint8)
    bytes_[:] = CANARY
    receiver = Endpoint(NixlTransport)
    print(receiver.transport.register(region).hex(), flush=True)
    receiver.transport.admit(Window(1, BLOCKS))
    eventually(lambda: bool((bytes_[:: 1 << 12] != CANARY).any()))
    hold_back_the_engine()
    print("receiving", flush=True)
    if sys.stdin.readline().strip() == "revoke":
        receiver.transport.revoke(1)
        receiver.revoked(1)
    else:
        receiver.transport.close_blocks(1, BLOCKS)
    bytes_[:] = CANARY
    threading.Event().wait(0.5)
    print(np.count_nonzero(bytes_ != CANARY), flush=True)
    receiver.transport.close()


main()
