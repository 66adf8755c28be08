"""The ``mooncake`` transport on the real engine: the suite, and revocation on an engine that cannot revoke."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.conformance import TransportConformance
from embferry.testing.pair import CANARY, LARGE, SMALL, Endpoint, TransportPair, eventually
from embferry.transports.contract import Transport
from embferry.transports.leased.mooncake import MooncakeTransport, engine
from embferry.transports.leased.mooncake.alias import Alias
from embferry.transports.leased.mooncake.engine import P2P, Engine, EngineSettings
from tests.transports.leased_peer import decoded, holder, line, receiving, running

pytestmark = [pytest.mark.integration, pytest.mark.engines]

ALL = tuple(range(LARGE.num_blocks))


def make(wake: Callable[[], None], **arguments: Any) -> Transport:
    return MooncakeTransport(wake, revoke_grace_s=0.2, **arguments)


def patient(wake: Callable[[], None]) -> Transport:
    return MooncakeTransport(wake, revoke_grace_s=60.0)


class TestMooncakeRegisteredSources(TransportConformance):
    """As with RDMA: the engine reads from registered memory only."""

    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return MooncakeTransport(wake, register_sources=True)


@contextmanager
def paired(make: Callable[[Callable[[], None]], Transport] = make, geometry: Any = SMALL) -> Iterator[TransportPair]:
    pair = TransportPair(make, geometry)
    yield pair
    pair.close()


@contextmanager
def process_writing(pair: TransportPair, epoch: int) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of long writes to the whole region."""
    with running("mooncake_peer.py", "write", pair.handle.hex(), str(epoch)) as process:
        assert line(process) == "begun"
        eventually(lambda: bool((pair.bytes[:4096] != CANARY).any()))
        yield process


def bytes_in_flight() -> int:
    """Bytes for this process in the TCP queues of this host: not sent or not read yet (proc(5), /proc/net/tcp)."""
    ports = {connection.laddr.port for connection in psutil.Process().net_connections("tcp4")}
    total = 0
    for row in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:]):
        here, there = (int(row[n].rpartition(":")[2], 16) for n in (1, 2))
        unsent, unread = (int(part, 16) for part in row[4].split(":"))
        if row[3] == "01":  # established
            total += unread * (here in ports) + unsent * (there in ports)
    return total


# Revocation


def test_a_running_writer_is_asked_to_stop_and_no_sender_is_cut_off() -> None:
    with paired(patient, LARGE) as pair:
        pair.admit(1, ALL)
        with process_writing(pair, 1) as process:
            pair.receiver.transport.revoke(1)
            pair.receiver.revoked(1)
            pair.bytes[:] = CANARY
            outcome = line(process)
        pair.expect()
        assert len(receiving(pair).severed) == 0
        assert outcome == "refused"


@pytest.mark.parametrize("ending", ["continues", "dies"])
def test_a_stopped_writer_is_cut_off(ending: str) -> None:
    with paired(geometry=LARGE) as pair:
        pair.admit(1, ALL)
        with process_writing(pair, 1) as process:
            process.send_signal(signal.SIGSTOP)
            pair.receiver.transport.revoke(1)
            with pytest.raises(LocalProtocolError, match="await Revoked"):
                pair.admit(2, ALL)
            pair.receiver.revoked(1)
            assert len(receiving(pair).severed) == 1
            pair.admit(2, ALL)
            pair.bytes[:] = CANARY
            if ending == "continues":
                process.send_signal(signal.SIGCONT)
                assert line(process) == "refused"
            else:
                process.kill()
                process.wait(30)
        pair.expect()
        pieces = pair.fill(ALL)
        assert pair.write(2, ALL, pieces) is None, "others write on, through the new alias"
        pair.expect(pieces)


def test_unregistering_alone_does_not_stop_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for the alias. When this test fails, the engine has learned to revoke."""
    with paired(geometry=LARGE) as pair, monkeypatch.context() as patch:
        patch.setattr(Alias, "sever", lambda self: None)
        pair.admit(1, ALL)
        with process_writing(pair, 1) as process:
            process.send_signal(signal.SIGSTOP)
            pair.receiver.transport.revoke(1)
            pair.receiver.revoked(1)
            eventually(lambda: bytes_in_flight() == 0)  # what the stopped process had sent has been stored
            pair.bytes[:] = CANARY
            process.send_signal(signal.SIGCONT)
            eventually(lambda: bool((pair.bytes != CANARY).any()))


def test_a_killed_writer_is_cut_off_without_waiting_for_it() -> None:
    with paired(patient, LARGE) as pair:
        pair.admit(1, ALL)
        with process_writing(pair, 1) as process:
            process.kill()
            process.wait(30)
            pair.receiver.transport.revoke(1)
            pair.receiver.revoked(1)
            pair.bytes[:] = CANARY
        assert len(receiving(pair).severed) == 1
        pair.expect()


def test_closing_blocks_under_a_writer_cuts_it_off_at_once() -> None:
    with paired(patient, LARGE) as pair:
        pair.admit(1, ALL)
        with process_writing(pair, 1) as process:
            process.send_signal(signal.SIGSTOP)
            pair.receiver.transport.close_blocks(1, ALL)
            pair.bytes[:] = CANARY
            process.send_signal(signal.SIGCONT)
            assert line(process) == "refused"
        pair.expect()


def test_writes_of_others_fail_visibly_when_a_writer_is_cut_off_and_can_be_repeated() -> None:
    with paired(geometry=LARGE) as pair:
        first, second = ALL[:1], ALL[1:]
        pair.admit(1, first)
        pair.admit(2, second)
        pieces = pair.fill(second)
        with holder(pair, 0, epoch=1):
            pass  # a sender that dies with a lease
        eventually(lambda: any(lease.in_doubt for lease in receiving(pair).table.out()))
        tickets = [pair.start(2, second, pieces) for _ in range(8)]
        eventually(lambda: bool((pair.bytes != CANARY).any()))
        pair.receiver.transport.close_blocks(1, first)
        assert len(receiving(pair).severed) == 1
        errors = [pair.sender.written(ticket) for ticket in tickets]
        assert any(errors), "eight times 31 MiB were not through yet"
        assert all(error is None or error.retryable for error in errors)
        assert pair.write(2, second, pieces) is None
        pair.expect(pieces)


# A failed batch fails its chunk


def test_a_slice_that_cannot_be_started_fails_its_write_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with paired() as pair:
        pair.admit(1, (0, 1))
        pieces = pair.fill((0, 1))
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "submit", lambda *_: 0)
            error = pair.write(1, (0, 1), pieces)
        assert error is not None
        assert error.retryable
        assert pair.write(1, (0, 1), pieces) is None
        pair.expect(pieces)
        pair.receiver.transport.close_blocks(1, (0, 1))
        assert len(receiving(pair).severed) == 0, "nothing of it was in flight"


def test_a_slice_that_fails_leaves_its_lease_in_doubt_until_its_blocks_close(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.submit

    def astray(self: Engine, segment: str, source: int, target: int, length: int) -> int:
        return real(self, segment, source, 1 << 20, length)  # memory that belongs to no region

    with paired() as pair:
        pair.admit(1, (0, 1))
        pieces = pair.fill((0, 1))
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "submit", astray)
            error = pair.write(1, (0, 1), pieces)
        assert error is not None
        assert error.retryable
        pair.expect()
        assert pair.write(1, (0, 1), pieces) is None
        pair.expect(pieces)
        assert len(receiving(pair).severed) == 0
        pair.receiver.transport.close_blocks(1, (0, 1))
        assert len(receiving(pair).severed) == 1, "its bytes could still have been in flight"
        pair.admit(2, (0, 1))
        again = pair.fill((0, 1), seed=2)
        assert pair.write(2, (0, 1), again) is None
        pair.expect(again)


def test_a_killed_receiver_is_a_lost_link() -> None:
    with running("mooncake_peer.py", "receive") as process:
        handle = bytes.fromhex(line(process))
        sender = Endpoint(make)
        sender.transport.connect(handle)
        with paired() as other:
            pieces = other.fill((0, 1))
        sender.transport.write(handle, 1, (0, 1), pieces, 7)
        assert sender.written(7) is None
        process.kill()
        lost = sender.lost()
        assert lost.handle == handle
        assert lost.error.retryable
        sender.transport.close()


def test_small_writes_do_not_wait_for_large_ones() -> None:
    with paired(geometry=LARGE) as pair:
        pair.admit(1, ALL)
        many, few = pair.fill(ALL), pair.fill((0,))
        large = [pair.start(1, ALL, many) for _ in range(6)]
        small = pair.start(1, (0,), few)
        assert pair.sender.written(small) is None
        finished = [e for e in pair.sender.events if getattr(e, "ticket", None) in large]
        assert len(finished) < len(large)
        for ticket in large:
            assert pair.sender.written(ticket) is None


# Settings


def test_private_memory_cannot_be_registered() -> None:
    buffers, transport = MultimodalDataBuffers(SMALL, shared=False), MooncakeTransport()
    with pytest.raises(LocalProtocolError, match="shared=True"):
        transport.register(buffers)
    transport.close()
    buffers.close()


def test_settings_that_the_engine_would_not_follow_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(protocol: str, match: str) -> None:
        with pytest.raises(TransportError, match=match) as caught:
            Engine(EngineSettings("127.0.0.1", protocol, "", P2P))
        assert not caught.value.retryable

    monkeypatch.setattr(engine, "RDMA_DEVICES", str(tmp_path))
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    refused("rdma", "no RDMA device")
    (tmp_path / "mlx5_0").touch()
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    refused("rdma", "MC_FORCE_TCP is set")
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    refused("tcp", "unset it")


def test_without_the_engine_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers, transport = MultimodalDataBuffers(SMALL, shared=True), MooncakeTransport()
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(TransportError, match="libibverbs1") as caught:
        transport.register(buffers)
    assert not caught.value.retryable
    transport.close()
    buffers.close()


def test_the_engine_logs_errors_only() -> None:
    with running("mooncake_peer.py", "receive", stderr=subprocess.PIPE) as process:
        line(process)
        process.kill()
        _, log = process.communicate(timeout=30)
    levels = {text[0] for text in log.splitlines() if not text.startswith("WARNING: Logging before InitGoogleLogging")}
    assert levels <= {"E"}, log


def test_engines_that_meet_at_a_metadata_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_TCP_BIND_ADDRESS", "127.0.0.1")
    with running("mooncake_peer.py", "metadata") as process:
        url = f"http://127.0.0.1:{line(process)}/metadata"
        with paired(lambda wake: make(wake, metadata_server=url)) as pair:
            handle = decoded(pair)
            assert (handle.metadata_server, handle.segment[:10]) == (url, "127.0.0.1-")
            pair.admit(1, (3,))
            pieces = pair.fill((3,))
            assert pair.write(1, (3,), pieces) is None
            pair.expect(pieces)


LIES: list[tuple[dict[str, Any], str]] = [
    ({"protocol": "rdma"}, "configure the same"),
    ({"metadata_server": "http://10.0.0.1/metadata"}, "configure the same"),
    ({"segment": ""}, "not a handle"),
    ({"token": b"short"}, "not a handle"),
]


@pytest.mark.parametrize(("lie", "match"), LIES)
def test_a_handle_that_cannot_be_used_here_is_refused(lie: dict[str, Any], match: str) -> None:
    with paired() as pair:
        handle = msgspec.msgpack.encode(msgspec.structs.replace(decoded(pair), **lie))
        with pytest.raises(TransportError, match=match) as caught:
            pair.sender.transport.connect(handle)
    assert not caught.value.retryable
