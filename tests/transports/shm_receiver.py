"""A receiver over shm: prints its handle, then waits to be killed."""

from __future__ import annotations

import signal

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.testing.pair import SMALL
from embferry.transports.contract import Window
from embferry.transports.shm import ShmTransport

buffers = MultimodalDataBuffers(SMALL, shared=True)
transport = ShmTransport()
handle = transport.register(buffers)
transport.admit(Window(1, (0, 1)))
print(handle.hex(), flush=True)
signal.pause()
