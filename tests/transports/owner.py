"""A receiver in a process of its own: prints its handle, then waits to be killed."""

from __future__ import annotations

import signal

from embferry.disaggregation.base.conn_multimodal import Window
from embferry.disaggregation.buffers import MultimodalDataBuffers
from embferry.disaggregation.shm import ShmTransport
from embferry.testing.pair import SMALL

buffers = MultimodalDataBuffers(SMALL, shared=True)
transport = ShmTransport()
handle = transport.register(buffers)
transport.admit(Window(1, (0, 1)))
print(handle.hex(), flush=True)
signal.pause()
