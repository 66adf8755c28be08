"""The ``nixl`` transport on the real engine, with UCX on shared memory and on sockets."""

from __future__ import annotations

import importlib.util
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager

import msgspec
import numpy as np
import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.conformance import TransportConformance
from embferry.testing.pair import CANARY, LARGE, SMALL, Endpoint, TransportPair, eventually
from embferry.transports.contract import LinkLost, Piece, Transport, Window, Written
from embferry.transports.leased import messages as m
from embferry.transports.leased.nixl import NixlTransport, agent, installed
from embferry.transports.windows import MAX_RANGES
from embferry.trust.greeting import Channel, Role
from tests.transports.leased_peer import TIMEOUT_S, decoded, frame, holder, line, receive, receiving, running
from tests.trust.raw import greet

pytestmark = [pytest.mark.integration, pytest.mark.engines]

BLOCKS = tuple(range(64))
MORE_THAN_CAN_LAND = 32  # writes of all blocks, while an agent is destroyed


class TestNixlOverSockets(TransportConformance):
    """As between hosts without RDMA: the receiver's progress thread stores what arrives."""

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


# Processes that stop and die


def script(name: str, tls: str, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    # UCX logs to standard output otherwise, which the test reads.
    return running(name, *arguments, UCX_LOG_FILE="stderr", UCX_TLS=tls)


@contextmanager
def writing(pair: TransportPair, tls: str) -> Iterator[subprocess.Popen[str]]:
    """A process that writes into all blocks under epoch 1 without end."""
    with script("nixl_writer.py", tls, pair.handle.hex(), "1", str(len(BLOCKS))) as process:
        pair.admit(1, BLOCKS)
        eventually(lambda: bool((pair.bytes != CANARY).any()))
        yield process


def stop_in_a_write(pair: TransportPair, process: subprocess.Popen[str]) -> None:
    """Stops the process while it holds a lease; between two writes there would be none to wait for."""

    def holds_a_lease() -> bool:
        process.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.1)  # for what it had said by then to be read
        if receiving(pair).table.out():
            return True
        process.send_signal(signal.SIGCONT)
        return False

    eventually(holds_a_lease)


def tell(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdin is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()


@pytest.fixture(params=["all", "tcp"])
def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


def never_changes(pair: TransportPair) -> None:
    """Bytes in flight arrive within milliseconds; a quarter of a second is for a busy machine."""
    pair.bytes[:] = CANARY
    threading.Event().wait(0.25)
    pair.expect()


def test_revocation_waits_for_a_stopped_writer_and_completes_when_it_is_killed(tls: str) -> None:
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


def test_bytes_of_a_killed_writer_in_a_socket_are_not_stored_after_revoked() -> None:
    with script("nixl_receiver.py", "tcp") as receiver, script("nixl_writer.py", "tcp", line(receiver), "1", "64") as w:
        assert line(receiver) == "receiving"
        receiver.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.1)  # for the sockets to fill
        w.kill()
        w.wait(TIMEOUT_S)
        tell(receiver, "revoke")
        receiver.send_signal(signal.SIGCONT)
        assert line(receiver) == "0"


def test_a_running_writer_stops_when_its_epoch_is_revoked(tls: str) -> None:
    pair = TransportPair(NixlTransport, LARGE)
    with writing(pair, tls) as process:
        pair.receiver.transport.revoke(1)
        pair.receiver.revoked(1)
        never_changes(pair)
        assert line(process) == "retryable False"
    pair.close()


def test_closing_fails_while_a_stopped_writer_on_this_host_may_go_on() -> None:
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
    (sender,) = receiving(pair).listener.connections
    made = receiving(pair).agents[sender].result()
    assert not isinstance(made, TransportError)
    # The replacement comes first: the sender may notice the end, and the receiver tear down, at any moment.
    receiving(pair).agents[sender] = gone = Future()
    made[0].close()
    gone.set_result(TransportError("destroyed by the test"))
    errors = [pair.sender.written(ticket) for ticket in tickets]
    assert any(error is not None for error in errors)
    assert all(error is None or error.retryable for error in errors)
    assert pair.sender.lost().handle == pair.handle
    assert [type(event) for event in pair.sender.events] == [Written] * MORE_THAN_CAN_LAND + [LinkLost]
    assert receiving(pair).table.out() == (), "the receiver hung up only after it had ended the leases"
    pair.receiver.transport.revoke(1)
    pair.receiver.revoked(1)
    never_changes(pair)
    pair.sender.transport.connect(pair.handle)
    pair.admit(2, BLOCKS)
    assert pair.write(2, BLOCKS, pieces) is None
    pair.expect(pieces)


@pytest.mark.parametrize("how", ["it is still in use", "it is gone"])
def test_an_agent_that_cannot_be_destroyed_is_reported(pair: TransportPair, how: str) -> None:
    """Late bytes might still come through it, so no lease of it ends; polling raises instead of waiting forever."""
    pair.admit(1, (3,))
    assert pair.write(1, (3,), pair.fill((3,))) is None
    (sender,) = receiving(pair).listener.connections
    made = receiving(pair).agents[sender].result()
    assert not isinstance(made, TransportError)
    held = [made[0]._agent]
    if how == "it is gone":
        held.clear()
        made[0].close()
    pair.sender.transport.disconnect(pair.handle)
    with pytest.raises(LocalProtocolError, match="report this as a bug"):
        pair.receiver.until(lambda: False)
    held.clear()  # now: the traceback keeps this frame, and an agent must not outlive its region


def test_an_abandoned_write_ends_only_when_none_of_its_bytes_is_in_flight(over_sockets: TransportPair) -> None:
    """With no time to drain, both agents are destroyed, the receiver's before the sender reports the error."""
    sender = Endpoint(lambda wake: NixlTransport(wake, drain_timeout_s=0.0))
    pieces = over_sockets.fill(BLOCKS)
    with script("nixl_receiver.py", "tcp") as receiver:
        handle = bytes.fromhex(line(receiver))
        sender.transport.connect(handle)
        for ticket in range(8):
            sender.transport.write(handle, 1, BLOCKS, pieces, ticket)
        assert line(receiver) == "receiving"
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
def test_an_impossible_backend_is_an_error_of_register(backends: dict[str, dict[str, str]]) -> None:
    transport, region = NixlTransport(backends=backends), MultimodalDataBuffers(SMALL, shared=False)
    with pytest.raises(TransportError) as caught:
        transport.register(region)
    assert not caught.value.retryable
    transport.close()
    region.close()


def test_a_sender_without_the_backend_loses_the_link_with_the_reason(pair: TransportPair) -> None:
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
def test_impossible_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        NixlTransport(**arguments)  # type: ignore[arg-type]  # that is the point


def test_without_the_binding_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not installed()
    agent.binding.cache_clear()
    with pytest.raises(TransportError, match=re.escape("pip install 'embferry[nixl]'")):
        NixlTransport()
    agent.binding.cache_clear()


# Requests


@pytest.mark.parametrize("slice_bytes", [7, 1000, 1 << 30])
def test_a_write_cut_into_slices_arrives_whole(slice_bytes: int) -> None:
    pair = TransportPair(lambda wake: NixlTransport(wake, slice_bytes=slice_bytes))
    pair.admit(1, (9, 2, 3))
    pieces = pair.fill((9, 2, 3))
    assert pair.write(1, (9, 2, 3), pieces) is None
    pair.expect(pieces)
    pair.close()


def test_writes_whose_sources_overlap_all_arrive() -> None:
    """NIXL does not find a large registered range behind smaller ones inside it, so these writes take turns."""
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


def test_a_write_with_too_many_pieces_or_none_is_refused(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    pair.expect_refused(pair.write(1, (0,), [pair.fill((0,))[0]] * (MAX_RANGES + 1)))
    pair.expect_refused(pair.write(1, (0,), []))


def test_several_senders_write_at_the_same_time() -> None:
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
    assert len(receiving(pair).agents) == 5, "an agent for each, and for the pair's own sender"
    for sender in senders:
        sender.transport.close()
    pair.close()


# The side channel


def test_an_ask_waits_for_a_lease_on_closed_blocks(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    with holder(pair, 5, epoch=1) as sock:
        pair.receiver.transport.close_blocks(1, (0,))
        assert receive(sock) == m.Stop(5)
        pair.admit(2, (0,))
        pieces = pair.fill((0,))
        ticket = pair.start(2, (0,), pieces)
        eventually(lambda: bool(receiving(pair).table._waiting))
        assert pair.sender.transport.poll() == []
        sock.sendall(frame(m.Done(5), 2))
        assert pair.sender.written(ticket) is None
    pair.expect(pieces)


def test_metadata_that_nixl_does_not_understand_is_a_lost_link(pair: TransportPair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        handle = msgspec.msgpack.encode(msgspec.structs.replace(decoded(pair), port=listener.getsockname()[1]))
        pair.sender.transport.connect(handle)
        pair.sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
        connection = greet(listener.accept()[0], Channel.NIXL, Role.ACCEPTOR)
        with connection:
            assert isinstance(receive(connection), m.Hello)
            connection.sendall(frame(m.Welcome(b"not what an agent says", 0)))
            assert pair.sender.written(1) is not None
            assert not pair.sender.lost().error.retryable
