"""The ``nixl`` transport, over the real engine, and with UCX both on shared memory and on its sockets."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.conformance import TransportConformance
from embferry.testing.pair import CANARY, LARGE, SMALL, Endpoint, TransportPair, eventually
from embferry.transports.contract import LinkLost, Piece, Transport, Window, Written
from embferry.transports.leased.nixl import NixlTransport, agent, installed
from embferry.transports.leased.nixl.messages import MAX_RANGES
from embferry.transports.leased.nixl.server import Incoming, Server

pytestmark = [pytest.mark.integration, pytest.mark.engines]

TIMEOUT_S = 20.0
BLOCKS = tuple(range(64))
MORE_THAN_CAN_LAND = 32  # writes of all blocks, while an agent is destroyed


class TestNixlOverSockets(TransportConformance):
    """What UCX does between hosts without RDMA: bytes arrive by themselves, on the receiver's progress thread."""

    shared_region = False

    @pytest.fixture(autouse=True)
    def sockets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")

    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return NixlTransport(wake, slice_bytes=3 << 20)


@pytest.fixture
def pair() -> Iterator[TransportPair]:
    pair = TransportPair(NixlTransport)
    yield pair
    pair.close()


@pytest.fixture
def over_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[TransportPair]:
    monkeypatch.setenv("UCX_TLS", "tcp")
    pair = TransportPair(NixlTransport, LARGE)
    yield pair
    pair.close()


def server(pair: TransportPair) -> Server:
    transport = pair.receiver.transport
    assert isinstance(transport, NixlTransport)
    assert transport._receiving is not None
    return transport._receiving


# Processes that stop and die


@contextmanager
def script(name: str, tls: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    # Standard output is ours.
    command = [
        "env",
        "UCX_LOG_FILE=stderr",
        f"UCX_TLS={tls}",
        sys.executable,
        str(Path(__file__).with_name(name)),
        *arguments,
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


@contextmanager
def writing(pair: TransportPair, tls: str) -> Iterator[subprocess.Popen[str]]:
    """A process that writes into all blocks under epoch 1 without end."""
    with script("nixl_writer.py", tls, pair.handle.hex(), "1", str(len(BLOCKS))) as process:
        pair.admit(1, BLOCKS)
        eventually(lambda: bool((pair.bytes != CANARY).any()))
        yield process


def stop_in_a_write(pair: TransportPair, process: subprocess.Popen[str]) -> None:
    """It may be stopped between two writes as well: all are done, and to revoke them takes no time. Then once more."""

    def stopped() -> bool:
        process.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.1)  # what it had said by then has been read
        if server(pair).gate.out():
            return True
        process.send_signal(signal.SIGCONT)
        return False

    eventually(stopped)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdin is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()


@pytest.fixture(params=["all", "tcp"])
def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


def never_changes(pair: TransportPair) -> None:
    """What is on its way arrives within milliseconds; a quarter of a second is for a busy machine."""
    pair.bytes[:] = CANARY
    threading.Event().wait(0.25)
    pair.expect()


def test_revocation_waits_for_a_stopped_writer_and_is_true_when_it_is_killed(tls: str) -> None:
    pair = TransportPair(NixlTransport, LARGE)
    with writing(pair, tls) as process:
        stop_in_a_write(pair, process)
        pair.receiver.transport.revoke(1)
        threading.Event().wait(0.25)
        assert pair.receiver.transport.poll() == []
        with pytest.raises(LocalProtocolError):
            pair.admit(2, BLOCKS[:1])
        process.kill()
        pair.receiver.revoked(1)
        never_changes(pair)
        pair.admit(2, BLOCKS)
        pieces = pair.fill(BLOCKS)
        assert pair.write(2, BLOCKS, pieces) is None, "another sender did not notice"
        pair.expect(pieces)
    pair.close()


def test_what_a_dead_writer_left_in_its_socket_never_lands_after_revoked() -> None:
    with script("nixl_receiver.py", "tcp") as receiver, script("nixl_writer.py", "tcp", line(receiver), "1", "64") as w:
        assert line(receiver) == "landing"
        receiver.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.1)  # for the sockets to fill
        w.kill()
        w.wait(TIMEOUT_S)
        tell(receiver, "revoke")
        receiver.send_signal(signal.SIGCONT)
        assert line(receiver) == "0"


def test_a_living_writer_is_stopped(tls: str) -> None:
    pair = TransportPair(NixlTransport, LARGE)
    with writing(pair, tls) as process:
        pair.receiver.transport.revoke(1)
        pair.receiver.revoked(1)
        never_changes(pair)
        assert line(process) == "retryable False"
    pair.close()


def test_closing_names_a_stopped_writer_that_may_go_on() -> None:
    pair = TransportPair(lambda wake: NixlTransport(wake, close_timeout_s=0.25), LARGE)
    with writing(pair, "all") as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TransportError, match="give the region up") as caught:
            pair.receiver.transport.close()
        assert not caught.value.retryable
    pair.close()


# Engines that fail


def test_a_failed_transfer_fails_its_write_and_the_next_link_resumes(over_sockets: TransportPair) -> None:
    """The receiver's agent is destroyed under a write."""
    pair = over_sockets
    pair.admit(1, BLOCKS)
    pieces = pair.fill(BLOCKS)
    tickets = [pair.start(1, BLOCKS, pieces) for _ in range(MORE_THAN_CAN_LAND)]
    eventually(lambda: bool((pair.bytes != CANARY).any()))
    (incoming,) = server(pair).listener.connections
    assert incoming._agent is not None
    made = incoming._agent.result()
    assert not isinstance(made, TransportError)

    def destroyed() -> TransportError:
        made[0].close()
        return TransportError("destroyed by the test")

    # In place of the agent before it is gone: the sender may notice, and the receiver tear down, at any moment.
    incoming._agent = server(pair).agents.submit(destroyed)
    errors = [pair.sender.written(ticket) for ticket in tickets]
    assert any(error is not None for error in errors)
    assert all(error is None or error.retryable for error in errors)
    assert pair.sender.lost().handle == pair.handle
    assert [type(event) for event in pair.sender.events] == [Written] * MORE_THAN_CAN_LAND + [LinkLost]
    assert server(pair).gate.out() == (), "the receiver hung up only after it had ended the leases"
    pair.receiver.transport.revoke(1)
    pair.receiver.revoked(1)
    never_changes(pair)
    pair.sender.transport.connect(pair.handle)
    pair.admit(2, BLOCKS)
    assert pair.write(2, BLOCKS, pieces) is None
    pair.expect(pieces)


@pytest.mark.parametrize("how", ["it is still in use", "it is gone"])
def test_an_agent_that_cannot_be_destroyed_is_reported(pair: TransportPair, how: str) -> None:
    """Late bytes might still come through it, so nothing is said to be over; and nobody waits in vain."""
    pair.admit(1, (3,))
    assert pair.write(1, (3,), pair.fill((3,))) is None
    (incoming,) = server(pair).listener.connections
    assert incoming._agent is not None
    made = incoming._agent.result()
    assert not isinstance(made, TransportError)
    held = [made[0]._agent]
    if how == "it is gone":
        held.clear()
        server(pair).agents.submit(made[0].close).result(TIMEOUT_S)
    pair.sender.transport.disconnect(pair.handle)
    with pytest.raises(LocalProtocolError, match="report this as a bug"):
        pair.receiver.until(lambda: False)
    held.clear()  # now: the traceback keeps this frame, and an agent must not outlive its region


def test_a_write_that_was_cut_off_ends_when_nothing_is_on_its_way(over_sockets: TransportPair) -> None:
    """With no time to drain, both agents are destroyed, the receiver's before the sender reports the error."""
    sender = Endpoint(lambda wake: NixlTransport(wake, drain_timeout_s=0.0))
    pieces = over_sockets.fill(BLOCKS)
    with script("nixl_receiver.py", "tcp") as receiver:
        handle = bytes.fromhex(line(receiver))
        sender.transport.connect(handle)
        for ticket in range(8):
            sender.transport.write(handle, 1, BLOCKS, pieces, ticket)
        assert line(receiver) == "landing"
        receiver.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.1)  # for the sockets to fill
        sender.transport.disconnect(handle)
        threading.Event().wait(0.25)
        sender.poll()
        assert [event for event in sender.events if isinstance(event, Written) and event.error is not None] == []
        receiver.send_signal(signal.SIGCONT)
        errors = [sender.written(ticket) for ticket in range(8)]
        assert any(error is not None for error in errors)
        assert all(error is None or error.retryable for error in errors)
        tell(receiver, "close_blocks")
        assert line(receiver) == "0"
    sender.transport.close()


@pytest.mark.parametrize("backends", [{"NONE_SUCH": {}}, {"UCX": {"ucx_error_handling_mode": "none such"}}])
def test_a_backend_that_cannot_be_is_an_error_of_register(backends: dict[str, dict[str, str]]) -> None:
    transport, region = NixlTransport(backends=backends), MultimodalDataBuffers(SMALL, shared=False)
    with pytest.raises(TransportError) as caught:
        transport.register(region)
    assert not caught.value.retryable
    transport.close()
    region.close()


def test_a_sender_without_the_backend_is_told(pair: TransportPair) -> None:
    sender = Endpoint(lambda wake: NixlTransport(wake, backends={"NONE_SUCH": {}}))
    sender.transport.connect(pair.handle)
    sender.transport.write(pair.handle, 1, (0,), pair.fill((0,)), 1)
    assert sender.written(1) is not None
    lost = sender.lost()
    assert "NONE_SUCH" in str(lost.error)
    assert not lost.error.retryable
    sender.transport.close()


def test_parameters_reach_the_backend() -> None:
    pair = TransportPair(lambda wake: NixlTransport(wake, backends={"UCX": {"num_workers": "2"}}))
    pair.admit(1, (3,))
    pieces = pair.fill((3,))
    assert pair.write(1, (3,), pieces) is None
    pair.expect(pieces)
    pair.close()


@pytest.mark.parametrize("arguments", [{"backends": {}}, {"slice_bytes": 0}])
def test_settings_that_cannot_be(arguments: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        NixlTransport(**arguments)  # type: ignore[arg-type]  # that is the point


def test_without_the_binding_there_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not installed()
    agent.binding.cache_clear()
    with pytest.raises(TransportError, match=re.escape("pip install 'embferry[nixl]'")):
        NixlTransport()
    agent.binding.cache_clear()


# Requests


@pytest.mark.parametrize("slice_bytes", [7, 1000, 1 << 30])
def test_slices_put_together_are_the_write(slice_bytes: int) -> None:
    pair = TransportPair(lambda wake: NixlTransport(wake, slice_bytes=slice_bytes))
    pair.admit(1, (9, 2, 3))
    pieces = pair.fill((9, 2, 3))
    assert pair.write(1, (9, 2, 3), pieces) is None
    pair.expect(pieces)
    pair.close()


def test_sources_that_overlap() -> None:
    """Were they registered as they come, NIXL would not find the large one behind the small ones inside it."""
    pair = TransportPair(lambda wake: NixlTransport(wake, slice_bytes=8))
    row = SMALL.block_size * SMALL.layout.fields[0].token_bytes
    source = memoryview(np.random.default_rng(0).integers(0, 256, row, np.uint8))
    pieces = [[Piece(source, 0)], *([Piece(source[at : at + 2], row + 2 * at)] for at in range(20))]
    pieces += [[Piece(source[: at + 50], (at + 2) * row)] for at in range(3)]
    pair.admit(1, tuple(range(8)))
    tickets = [pair.start(1, (0,), piece) for piece in pieces]
    assert [pair.sender.written(ticket) for ticket in tickets] == [None] * len(pieces)
    pair.expect(*pieces)
    pair.close()


def test_too_many_pieces_are_refused_here(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    pair.expect_refused(pair.write(1, (0,), [pair.fill((0,))[0]] * (MAX_RANGES + 1)))
    pair.expect_refused(pair.write(1, (0,), []))


def test_a_crowd_is_served_in_turn() -> None:
    """Several senders, each with an agent of its own at the receiver."""
    pair = TransportPair(NixlTransport)
    senders = [Endpoint(NixlTransport) for _ in range(4)]
    written = []
    for block, sender in enumerate(senders):
        sender.transport.connect(pair.handle)
        pair.receiver.transport.admit(Window(block + 1, (block,)))
        pieces = pair.fill((block,), seed=block)
        sender.transport.write(pair.handle, block + 1, (block,), pieces, 7)
        written.append(pieces)
    assert [sender.written(7) for sender in senders] == [None] * 4
    pair.expect(*written)
    assert all(isinstance(connection, Incoming) for connection in server(pair).listener.connections)
    for sender in senders:
        sender.transport.close()
    pair.close()
