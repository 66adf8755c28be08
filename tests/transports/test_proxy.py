"""The chaos proxy of the testing package."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import pytest

from embferry.testing.pair import eventually
from embferry.testing.proxy import ChaosProxy
from embferry.testing.stream_faults import Fault
from tests.ports import free_port

pytestmark = pytest.mark.integration

SECONDS = 20.0


@contextmanager
def upstream() -> Iterator[int]:
    """Starts a server that echoes, one connection after another, and yields its port."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                try:
                    while data := sock.recv(1 << 16):
                        sock.sendall(data)
                except ConnectionError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)
        assert not thread.is_alive()


def client(proxy: ChaosProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), SECONDS)


def read_to_end(sock: socket.socket) -> bytes:
    return b"".join(iter(partial(sock.recv, 1 << 16), b""))


def test_all_bytes_and_a_half_close_are_forwarded() -> None:
    data = os.urandom(1 << 20)
    with upstream() as port, ChaosProxy(port) as proxy, client(proxy) as sock:
        sending = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
        sending.start()
        assert read_to_end(sock) == data
        sending.join()
        assert (proxy.to_clients, proxy.to_upstream, proxy.cuts) == ([len(data)], [len(data)], 0)


@pytest.mark.parametrize("toward", ["clients", "upstream"])
def test_connections_are_cut_at_the_byte_a_given_number_of_times(toward: Literal["clients", "upstream"]) -> None:
    with upstream() as port, ChaosProxy(port, cut_after=7, times=2, toward=toward) as proxy:
        for _ in range(2):
            with client(proxy) as sock:
                sock.sendall(b"123456789")
                assert read_to_end(sock) in ((b"1234567",) if toward == "clients" else (b"", b"1234567"))
        with client(proxy) as sock:
            sock.sendall(b"123456789")
            assert sock.recv(9, socket.MSG_WAITALL) == b"123456789"
        counts = proxy.to_clients if toward == "clients" else proxy.to_upstream
        assert counts == [7, 7, 9]
        assert proxy.cuts == 2


def test_no_byte_is_lost_in_a_stall() -> None:
    with upstream() as port, ChaosProxy(port) as proxy, client(proxy) as sock:
        sock.sendall(b"one")
        assert sock.recv(3, socket.MSG_WAITALL) == b"one"
        proxy.stall()
        sock.sendall(b"two")
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert proxy.to_upstream == [3]
        proxy.resume()
        sock.settimeout(SECONDS)
        assert sock.recv(3, socket.MSG_WAITALL) == b"two"


@pytest.mark.parametrize("stalled", [False, True])
def test_refuse_cuts_and_refuses_all_connections(stalled: bool) -> None:
    with upstream() as port, ChaosProxy(port) as proxy, client(proxy) as sock:
        eventually(lambda: len(proxy.to_clients) == 1)
        if stalled:
            proxy.stall()
        proxy.refuse()
        assert read_to_end(sock) == b""
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                client(proxy)


def test_connections_are_refused_after_the_last_cut() -> None:
    with upstream() as port, ChaosProxy(port, cut_after=3, dies=True) as proxy:
        with client(proxy) as sock:
            sock.sendall(b"123456789")
            assert read_to_end(sock) == b"123"
        with pytest.raises(ConnectionRefusedError):
            client(proxy)


def test_a_client_is_disconnected_if_there_is_no_upstream() -> None:
    with ChaosProxy(free_port()) as proxy, client(proxy) as sock:
        assert read_to_end(sock) == b""


def test_no_thread_and_no_descriptor_is_left() -> None:
    def remains() -> tuple[int, set[threading.Thread]]:
        gc.collect()  # descriptors of earlier tests
        return len(os.listdir("/proc/self/fd")), set(threading.enumerate())

    before = remains()
    with upstream() as port, ChaosProxy(port) as proxy:
        clients = [client(proxy) for _ in range(3)]
        proxy.stall()
        for sock in clients:
            sock.sendall(b"on its way")
    for sock in clients:
        sock.close()
    assert remains() == before


@pytest.mark.parametrize("toward", ["clients", "upstream"])
def test_everything_is_swallowed_from_a_byte_on_also_on_new_connections(toward: Literal["clients", "upstream"]) -> None:
    with upstream() as port, ChaosProxy(port, swallow_after=5, toward=toward) as proxy:
        with client(proxy) as first:
            first.sendall(b"1234567")
            assert first.recv(5, socket.MSG_WAITALL) == b"12345"
            eventually(lambda: proxy.swallowed == 2)
        with client(proxy) as second:
            second.sendall(b"89")
            eventually(lambda: proxy.swallowed == 4)
            second.shutdown(socket.SHUT_WR)
            assert read_to_end(second) == b""


def test_a_slow_and_delayed_connection_loses_nothing() -> None:
    data = os.urandom(50_000)
    with upstream() as port, ChaosProxy(port, bytes_per_s=200_000, delay_s=0.1) as proxy, client(proxy) as sock:
        began = time.monotonic()
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == data
        assert time.monotonic() - began >= 0.2, "delayed on the way there and on the way back"


def test_a_flipped_bit_reaches_the_other_end() -> None:
    with upstream() as port, ChaosProxy(port) as proxy, client(proxy) as sock:
        for toward in ("upstream", "clients"):
            proxy.arm(Fault("flip", toward, at=2, bit=7))
            sock.sendall(b"abcd")
            assert sock.recv(4, socket.MSG_WAITALL) == b"ab\xe3d"
            assert proxy.struck.is_set()


@pytest.mark.parametrize("toward", ["clients", "upstream"])
def test_a_connection_is_reset_or_cut_at_a_byte(toward: Literal["clients", "upstream"]) -> None:
    with upstream() as port, ChaosProxy(port) as proxy:
        with client(proxy) as sock:
            proxy.arm(Fault("reset", toward, at=2))
            sock.sendall(b"abcd")
            with pytest.raises(ConnectionResetError):
                read_to_end(sock)
        with client(proxy) as sock:
            proxy.arm(Fault("cut", toward, at=2))
            sock.sendall(b"abcd")
            assert read_to_end(sock) in (b"", b"ab")
        with client(proxy) as sock:
            sock.sendall(b"abcd")
            assert sock.recv(4, socket.MSG_WAITALL) == b"abcd"


def test_one_connection_stalls_until_the_fault_is_disarmed() -> None:
    with upstream() as port, ChaosProxy(port) as proxy, client(proxy) as sock:
        proxy.arm(Fault("stall", at=2))
        sock.sendall(b"abcd")
        assert sock.recv(2, socket.MSG_WAITALL) == b"ab"
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(SECONDS)
        proxy.disarm()
        assert sock.recv(2, socket.MSG_WAITALL) == b"cd"


def test_bytes_that_are_held_back_arrive_when_the_connection_ends() -> None:
    with (
        upstream() as port,
        ChaosProxy(port, listen=("127.0.0.3", 0)) as proxy,
        socket.create_connection(("127.0.0.3", proxy.port), SECONDS) as sock,
    ):
        proxy.arm(Fault("reorder", at=2, length=100))
        sock.sendall(b"abcd")
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == b"abcd"
