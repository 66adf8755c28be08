"""The library, its discovery and the origin's queues need no pyzmq; the origin's wire says what to install."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

sys.modules["zmq"] = None  # an import of it raises ImportError
import embferry.disaggregation.multimodal_embedding, embferry.disaggregation.multimodal_language
import embferry.disaggregation.utils, embferry.discovery.bootstrap_server, embferry.disaggregation.wire
from embferry import Field, Geometry, InMemoryTransport, Layout
from embferry.disaggregation.wires import receive_manager, send_manager

pool = Geometry(Layout((Field("input_embeddings", "float32", 8),)), num_blocks=2, block_size=2)
receive_manager(pool, [InMemoryTransport()]).close()
send_manager(pool, [InMemoryTransport()]).close()
for manager in (send_manager, receive_manager):
    try:
        manager(pool, wire="origin")
    except ImportError as error:
        print(error)
"""


def test_only_the_origin_s_wire_needs_pyzmq() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pyzmq" in line and "embferry[mooncake]" in line for line in lines)
