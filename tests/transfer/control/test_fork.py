"""A forked child that closes its copies leaves the parent's connections alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

PROGRAM = """
import os
from embferry.transfer.control.limits import ControlLimits
from embferry.transfer.control.sockets import SocketControl
from embferry.transports.net.loop import Loop

loop = Loop()
server, client = SocketControl(loop, "127.0.0.1"), SocketControl(loop, limits=ControlLimits(connect_timeout=2.0))

def exchange(data):
    client.send(server.endpoint, data)
    got = []
    while not got:
        loop.run_once(None)
        got = server.poll()
    server.send(got[0].peer, data)
    while not client.poll():
        loop.run_once(None)
    return got[0].peer

peer = exchange(b"before")
client.send(server.endpoint, b"queued at the time of the fork")
child = os.fork()
if child == 0:
    if {closes}:
        client.send(server.endpoint, b"from the child")
        server.send(peer, b"from the child")
        client.flush()
        client.close()
        server.close()
        loop.close()
        os._exit(0)
    os.read(0, 1)  # keeps its copies until the parent has ended
    os._exit(0)
if {closes}:
    assert os.waitpid(child, 0)[1] == 0
assert exchange(b"after") == peer, "the same connection"
server.close()
while not any(type(event).__name__ == "Unreachable" for event in client.poll()):
    client.send(server.endpoint, b"x")
    loop.run_once(None)
client.close()
loop.close()
"""


@pytest.mark.parametrize("closes", [True, False])
def test_a_forked_child_does_not_disturb_the_parent(closes: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM.format(closes=closes)], stdin=subprocess.PIPE) as process:
        try:
            assert process.wait(100) == 0
        finally:
            process.kill()
