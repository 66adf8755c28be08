"""Whole programs: short of descriptors, forked, or unable to bind."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

SECONDS = 120

COMMON = """
import gc, os, resource, socket, subprocess, sys, threading, time
import numpy as np
from embferry import ReceiveManager, SendManager, wait
from embferry.protocol.errors import EmbeddingTransferError, TransportError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.settings import TransferSettings
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport

layout = Layout((Field("input_embeddings", "float32", 4),))
settings = TransferSettings(answer_timeout=60, peer_timeout=60, retry_interval=0.05)

def receive_manager():
    return ReceiveManager(Geometry(layout, 4, 4), [TcpTransport()], settings=settings)

def rows(seed, tokens=40):
    return {"input_embeddings": np.random.default_rng(seed).integers(0, 256, (tokens, 16), np.uint8)}

def begin(receiving, sending, room, ready=None):
    receiver = receiving.open(room, sending.endpoint)
    receiver.init()
    sender = sending.open(room)
    sender.init(40, b"digest")
    sender.send_embedding(rows(room), ready)
    return receiver, sender

def arrives(receiver, sender):
    sender.send_embedding(rows(receiver.room))
    wait(receiver, 60)
    assert np.array_equal(receiver.arrays()["input_embeddings"], rows(receiver.room)["input_embeddings"])
    receiver.clear()

def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)

def no_descriptors():
    '''Uses up every descriptor, and returns them.'''
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    holes = []
    while True:
        try:
            holes.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return holes

def unlimited():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
"""

WITHOUT_DESCRIPTORS = """
sending = SendManager(layout, [TcpTransport()], settings=settings)
known, new = receive_manager(), receive_manager()
arrives(*begin(known, sending, 1))
under_way = begin(known, sending, 2, 16)
until(lambda: under_way[0].transferred_tokens == 16)
later = new.open(3, sending.endpoint)
later.init()
until(lambda: 3 in sending.parked._by_room)  # its control connection is there, its data connection is not
holes = no_descriptors()
sender = sending.open(3)
sender.init(40, b"digest")
sender.send_embedding(rows(3))
arrives(*under_way)  # while no connection can be made
for hole in holes:
    os.close(hole)
unlimited()
try:
    arrives(later, sender)
except EmbeddingTransferError as error:
    assert "Too many open files" in str(error), error
assert sending.fault is known.fault is new.fault is None
arrives(*begin(new, sending, 4))
for manager in (sending, known, new):
    manager.close()
"""

IDLE_CONNECTIONS = """
sending = SendManager(layout, [TcpTransport()], settings=settings)
receiving = receive_manager()
arrives(*begin(receiving, sending, 1))
under_way = begin(receiving, sending, 2, 16)
until(lambda: under_way[0].transferred_tokens == 16)
program = '''
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [socket.create_connection(("127.0.0.1", int(port))) for port in sys.argv[1:] for _ in range(100)]
print(flush=True)
sys.stdin.read()
'''
listeners = sending._runtime.control._acceptor.listener, receiving.transports["tcp"]._transport._receiving.listener

def has_made_room():
    return any(listener.evicted for listener in listeners)

used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
with subprocess.Popen([sys.executable, "-c", program, *(str(one.port) for one in listeners)], **pipes) as idle:
    idle.stdout.readline()
    until(has_made_room)
    arrives(*under_way)
    arrives(*begin(receiving, sending, 3))
    idle.stdin.close()
assert sending.fault is receiving.fault is None
arrives(*begin(receiving, sending, 4))
sending.close()
receiving.close()
"""

FORKED = """
sending = SendManager(layout, [TcpTransport()], settings=settings)
receiving = receive_manager()
arrives(*begin(receiving, sending, 1))
under_way = begin(receiving, sending, 2, 16)
until(lambda: under_way[0].transferred_tokens == 16)
child = os.fork()
if child == 0:
    for manager in (sending, receiving):
        for transport in manager.transports.values():
            transport.close()
        manager._runtime.control.close()
        manager._runtime._loop.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
arrives(*under_way)
arrives(*begin(receiving, sending, 3))
sending.close()
receiving.close()
"""

CANNOT_BIND = """
with socket.create_server(("127.0.0.1", 0)) as taken:
    for _ in range(3):
        try:
            SendManager(layout, [TcpTransport(), HttpTransport(), ShmTransport(), InMemoryTransport()],
                        port=taken.getsockname()[1])
        except TransportError as error:
            assert "cannot listen" in str(error)
        else:
            raise AssertionError("the port was taken")
        gc.collect()
        try:
            ReceiveManager(Geometry(layout, 4, 4), [ShmTransport(), TcpTransport(port=taken.getsockname()[1])])
        except TransportError as error:
            assert "cannot listen" in str(error)
        else:
            raise AssertionError("the port was taken")
        gc.collect()
assert threading.active_count() == 1, threading.enumerate()
"""

NOT_CLOSED = """
sending = SendManager(layout, [TcpTransport()], settings=settings)
receiving = receive_manager()
arrives(*begin(receiving, sending, 1))
begin(receiving, sending, 2, 16)
"""


@pytest.mark.parametrize(
    "program",
    [WITHOUT_DESCRIPTORS, IDLE_CONNECTIONS, FORKED, CANNOT_BIND, NOT_CLOSED],
    ids=["without descriptors", "idle connections", "forked", "cannot bind", "not closed"],
)
def test_a_program_goes_on_and_ends(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
