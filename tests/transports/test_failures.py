"""Faults inside a transport, injected one by one: each costs a connection, or at most the transport, and no more."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from embferry.memory.buffers import MultimodalDataBuffers, source_pieces
from embferry.protocol.errors import TransportError
from embferry.testing.pair import DEADLINE_S, LAYOUT, SMALL, TransportPair, embedding, eventually
from embferry.transfer.guarded_transport import GuardedTransport
from embferry.transports.contract import LinkLost, Revoked, Transport, Window
from embferry.transports.http import remote_sender, serving
from embferry.transports.http import send_link as http_link
from embferry.transports.leased import receiving_end, sending_end
from embferry.transports.net import loop
from embferry.transports.registry import TRANSPORTS
from embferry.transports.shm import transport as shm
from embferry.transports.tcp import receive_server
from embferry.transports.tcp import send_link as tcp_link

pytestmark = pytest.mark.integration

CALLBACKS = [
    pytest.param("tcp", receive_server.SenderConnection, "_on_hello", id="tcp receiver: hello"),
    pytest.param("tcp", receive_server.SenderConnection, "_on_head", id="tcp receiver: head"),
    pytest.param("tcp", receive_server.SenderConnection, "_on_ranges", id="tcp receiver: ranges"),
    pytest.param("tcp", receive_server.SenderConnection, "_receive_payload", id="tcp receiver: payload"),
    pytest.param("tcp", receive_server.SenderConnection, "_finish", id="tcp receiver: end of a write"),
    pytest.param("tcp", receive_server.SenderConnection, "_send_verdicts", id="tcp receiver: verdict"),
    pytest.param("tcp", receive_server.SenderConnection, "__init__", id="tcp receiver: accept"),
    pytest.param("tcp", tcp_link.SendLink, "_send", id="tcp sender: write"),
    pytest.param("tcp", tcp_link.SendLink, "_on_connected", id="tcp sender: connected"),
    pytest.param("tcp", tcp_link.SendLink, "_flush", id="tcp sender: send"),
    pytest.param("tcp", tcp_link.SendLink, "_receive_verdicts", id="tcp sender: receive"),
    pytest.param("tcp", tcp_link.SendLink, "_on_verdict", id="tcp sender: verdict"),
    pytest.param("http", serving.ServerConnection, "__init__", id="http sender: accept"),
    pytest.param("http", serving.ServerConnection, "_receive", id="http sender: receive"),
    pytest.param("http", serving.ServerConnection, "_on_bytes_sent", id="http sender: send"),
    pytest.param("http", serving.SenderServer, "_on_request", id="http sender: request"),
    pytest.param("http", serving.SenderServer, "_respond_to_fetch", id="http sender: fetch"),
    pytest.param("http", serving.SenderServer, "_respond_to_poll", id="http sender: poll"),
    pytest.param("http", serving.SenderServer, "_answer_pending", id="http sender: pending poll"),
    pytest.param("http", http_link.SendLink, "_announce", id="http sender: publish"),
    pytest.param("http", http_link.SendLink, "finish", id="http sender: outcome"),
    pytest.param("http", remote_sender.RemoteSender, "poll", id="http receiver: poll"),
    pytest.param("http", remote_sender.RemoteSender, "_take", id="http receiver: publications"),
    pytest.param("http", remote_sender.Fetch, "on_head", id="http receiver: head"),
    pytest.param("http", remote_sender.Fetch, "receive", id="http receiver: payload"),
    pytest.param("http", remote_sender.Fetch, "on_end", id="http receiver: end of a fetch"),
    pytest.param("shm", shm._Link, "_copy_locked", id="shm sender: copy"),
    pytest.param("shm", shm._Link, "_watch", id="shm sender: watch"),
    *(
        pytest.param(name, kind, method, id=f"{name} {what}", marks=pytest.mark.engines)
        for name in ("nixl", "mooncake")
        for kind, method, what in (
            (receiving_end.SenderConnection, "__init__", "receiver: accept"),
            (receiving_end.SenderConnection, "_on_hello", "receiver: hello"),
            (receiving_end.SenderConnection, "_on_message", "receiver: message"),
            (receiving_end.SenderConnection, "send_verdict", "receiver: verdict"),
            (sending_end.SendingEnd, "_on_connected", "sender: connected"),
            (sending_end.SendingEnd, "_on_message", "sender: message"),
            (sending_end.SendingEnd, "_on_over", "sender: end of a write"),
            (sending_end.SendingEnd, "_start_check", "sender: signs of life"),
        )
    ),
]


def make(name: str, wake: Callable[[], None]) -> Transport:
    """Makes a transport that gives a peer up soon."""
    if name in ("nixl", "mooncake"):
        return TRANSPORTS[name].load()(wake, connect_timeout_s=2.0)  # type: ignore[call-arg]
    return TRANSPORTS[name].load()(wake, stall_timeout_s=1.0)  # type: ignore[call-arg]


POLLING = (remote_sender.RemoteSender, remote_sender.Fetch, serving.ServerConnection, serving.SenderServer)
"""Callbacks that also run for the other receiver, which polls meanwhile."""


class Bug:
    """Replaces a method by one that raises, the first time only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: type[Exception]) -> None:
        self.raised = 0
        self._real, self._error = getattr(owner, name), error
        bug = self

        def call(*arguments: Any, **named: Any) -> Any:
            if not bug.raised:
                bug.raised += 1
                raise bug._error("a bug")
            return bug._real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.parametrize(("name", "owner", "method"), CALLBACKS)
def test_what_a_callback_raises_ends_its_connection_only(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    owner: Any,
    method: str,
    error: type[Exception],
) -> None:
    """The write ends; writes to another receiver and, once connected again, to the same one succeed."""
    pair, other = (TransportPair(lambda wake: make(name, wake)) for _ in range(2))
    sender = pair.sender
    sender.transport.connect(other.handle)
    other.receiver.transport.connect_to_sender(sender.transport.address)
    other.admit(1, (0,))
    sender.transport.write(other.handle, 1, (0,), other.fill((0,)), 1000)
    assert sender.written(1000) is None  # the bug hits the other link
    bug = Bug(monkeypatch, owner, method, error)
    reconnect(pair)
    if owner is serving.SenderServer and method == "_answer_pending":
        eventually(lambda: len(sender.transport._server._polls) == 2)  # otherwise the write may come before the poll
    pair.admit(1, (1, 2))
    pieces = pair.fill((1, 2))
    first = pair.write(1, (1, 2), pieces)
    eventually(lambda: bug.raised == 1)
    assert first is None or isinstance(first, TransportError)
    if first is not None:
        succeeds_again(pair, pieces)
    pair.expect(pieces)
    sender.transport.write(other.handle, 1, (0,), other.fill((0,)), 1001)
    if sender.written(1001) is not None:
        assert owner in POLLING, "the other link was harmed"
        assert other.receiver is not None
        connect(other)
    for end in (pair.sender, pair.receiver, other.sender, other.receiver):
        end.poll()  # raises if a transport has failed
    eventually(lambda: any(record.exc_info for record in caplog.records if record.levelno >= logging.ERROR))
    pair.close()
    other.close()


def reconnect(pair: TransportPair) -> None:
    """Makes the link to the receiver of ``pair`` anew."""
    pair.sender.transport.disconnect(pair.handle)
    connect(pair)


def connect(pair: TransportPair) -> None:
    pair.sender.transport.connect(pair.handle)
    pair.receiver.transport.connect_to_sender(pair.sender.transport.address)


def succeeds_again(pair: TransportPair, pieces: list[Any]) -> None:
    """Connects and writes until that succeeds, as a manager does."""
    errors: list[TransportError | None] = []
    while len(errors) < 5:
        connect(pair)
        errors.append(pair.write(1, (1, 2), pieces))
        if errors[-1] is None:
            return
    pytest.fail(f"no attempt succeeds: {errors}")


def remains() -> tuple[int, set[threading.Thread], int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:embferry" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), set(threading.enumerate()), shared


def transports() -> Iterator[Any]:
    for name, spec in TRANSPORTS.items():
        yield pytest.param(name, marks=[pytest.mark.engines] * spec.needs_engine)


@pytest.mark.parametrize("name", list(transports()))
@pytest.mark.parametrize("fail", ["the loop", "a callback"])
def test_a_transport_whose_loop_fails_is_reported_once_and_leaves_nothing(name: str, fail: str) -> None:
    how = fail_loop if fail == "the loop" else fail_callback
    logging.disable()  # pytest keeps records, whose tracebacks hold the transports
    try:
        lose_both_ends(name, how)  # an engine makes some things once and for good
        before = remains()
        lose_both_ends(name, how)
    finally:
        logging.disable(logging.NOTSET)
    assert remains() == before


def lose_both_ends(name: str, fail: Callable[[loop.LoopThread], None]) -> None:
    """Makes the loops of a sender and of a receiver fail, with a write under way, and closes the transports."""
    region = MultimodalDataBuffers(SMALL, shared=True)
    receiver, sender = (GuardedTransport(make(name, lambda: None), lambda: None) for _ in range(2))
    handle = receiver.register(region)
    receiver.connect_to_sender(sender.address)
    sender.connect(handle)
    receiver.admit(Window(1, (0,)))
    source = embedding(LAYOUT, SMALL.block_size)
    sender.write(handle, 1, (0,), source_pieces(SMALL, source, 0, SMALL.block_size, (0,), 0), 1)
    for end in (sender, receiver):
        fail(end._transport._loop)  # type: ignore[attr-defined]
        eventually(partial(is_lost, end))
        assert end.lost is not None
        assert not end.lost.retryable
    receiver.revoke(1)
    assert receiver.poll() == [Revoked(1)]
    for end in (sender, receiver):
        end.close()
        assert end.poll() == []
    region.close()


@pytest.mark.parametrize("name", list(transports()))
def test_a_link_that_is_lost_while_it_is_disconnected_is_not_reported(name: str) -> None:
    pair = TransportPair(lambda wake: make(name, wake))
    pair.admit(1, (0,))
    pair.lands(1, (0,))
    transport: Any = pair.sender.transport
    link, is_disconnected = transport._links[pair.handle], threading.Event()

    def lose() -> None:
        assert is_disconnected.wait(DEADLINE_S)
        link.end(TransportError("the receiver is gone"), lost=True)

    transport._loop.call(lose)
    transport.disconnect(pair.handle)
    is_disconnected.set()
    eventually(lambda: not transport._unfinished)
    pair.sender.poll()
    assert LinkLost not in map(type, pair.sender.events)
    assert not transport._disconnected
    pair.close()


def is_lost(end: GuardedTransport) -> bool:
    end.poll()
    return end.lost is not None


def fail_loop(thread: loop.LoopThread) -> None:
    def fail() -> None:
        raise RuntimeError("a bug in the loop")

    thread.call(lambda: None)  # starts it, if nothing has
    thread.loop._run_timers = fail  # type: ignore[method-assign]
    thread.loop.wake()
    thread._thread.join(DEADLINE_S)
    assert not thread._thread.is_alive()


def fail_callback(thread: loop.LoopThread) -> None:
    def fail() -> None:
        raise RuntimeError("a bug in a callback")

    thread.call(fail)
