"""A receiver: prints its handle, then waits to be killed. ``receiver.py TRANSPORT [address of the sender]``."""

from __future__ import annotations

import signal
import sys

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.testing.pair import SMALL
from embferry.transports.contract import Window
from embferry.transports.registry import TRANSPORTS

name, *address = sys.argv[1:]
buffers = MultimodalDataBuffers(SMALL, shared=True)
transport = TRANSPORTS[name].load()()
handle = transport.register(buffers)
if address:
    transport.connect_to_sender(bytes.fromhex(address[0]))
transport.admit(Window(1, (0, 1)))
print(handle.hex(), flush=True)
while True:
    signal.pause()
