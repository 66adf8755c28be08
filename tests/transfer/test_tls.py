"""Pairs of managers over TLS: whole transfers, every way in which the ends can disagree, and renewal while they run."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from embferry import Field, Geometry, Layout, ReceiveManager, SendManager, TcpTransport, as_fields, wait
from embferry.protocol.errors import PeerGone, TlsFailed
from embferry.testing.pair import eventually
from embferry.transfer.control.sockets import SocketControl
from embferry.transports.contract import Transport
from embferry.transports.http import HttpTransport
from embferry.trust.trust import TLS_ENV, TLS_REQUIRED_ENV
from tests.trust.authority import Authority

pytestmark = pytest.mark.integration

LAYOUT = Layout((Field("input_embeddings", "float32", 256),))
GEOMETRY = Geometry(LAYOUT, num_blocks=16, block_size=64)
TOKENS = 5000
Files = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> Files:
    return authority.files("part")


@contextmanager
def certified(files: Files | None, *, required: bool = True) -> Iterator[None]:
    """Gives the parts that are made meanwhile a certificate, or none."""
    values = dict(zip(TLS_ENV, map(str, files or ("", "", "")), strict=True)) | {TLS_REQUIRED_ENV: str(int(required))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


class Pair:
    """A sender and a receiver, each with a certificate of its own, or none."""

    def __init__(
        self,
        sender: Files | None,
        receiver: Files | None,
        *,
        required: tuple[bool, bool] = (True, True),
        transport: Callable[[], Transport] = TcpTransport,
    ) -> None:
        with ExitStack() as stack:
            with certified(sender, required=required[0]):
                self.sending = SendManager(LAYOUT, [transport()])
            stack.callback(self.sending.close)
            with certified(receiver, required=required[1]):
                self.receiving = ReceiveManager(GEOMETRY, [transport()])
            stack.callback(self.receiving.close)
            self._stack = stack.pop_all()
        self._room = 0

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def transfer(self, endpoint: str | None = None) -> None:
        """Moves an embedding, and checks every byte of it."""
        self._room += 1
        data = np.random.default_rng(self._room).standard_normal((TOKENS, 256), np.float32)
        sender = self.sending.open(self._room)
        sender.init(total_tokens=TOKENS, content_digest=b"digest %d" % self._room)
        sender.send_embedding(as_fields({"input_embeddings": data}))
        receiver = self.receiving.open(self._room, endpoint or self.sending.endpoint)
        receiver.init()
        wait(receiver, timeout=60)
        assert np.array_equal(receiver.arrays()["input_embeddings"].view(np.float32), data)
        receiver.clear()

    def reconnect(self) -> None:
        """Cuts every connection that the sender has accepted."""
        control = self.sending._runtime.control
        assert isinstance(control, SocketControl)
        assert control._acceptor is not None
        (connection,) = control._acceptor.listener.connections
        connection._sock._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def failure(self, endpoint: str | None = None) -> str:
        """Returns the reason why a transfer fails, at the first attempt to connect.

        It is told as a peer that cannot be reached, because another one may be asked instead.
        """
        with pytest.raises(PeerGone, match=r"\((0\.\d s of attempts)\)|has no certificate") as caught:
            self.transfer(endpoint)
        return caught.value.detail


@pytest.mark.parametrize("transport", [TcpTransport, HttpTransport])
def test_embeddings_cross_over_tls(files: Files, authority: Authority, transport: Callable[[], Transport]) -> None:
    other = authority.files(f"other-{transport.__name__}")
    with Pair(files, other, transport=transport) as pair:
        assert pair.sending.endpoint.startswith("tls://127.0.0.1:")
        for _ in range(3):
            pair.transfer()


def test_a_certificate_of_another_ca_is_told_at_once(files: Files, tmp_path: Path) -> None:
    with Pair(files, Authority.make(tmp_path).files("stranger")) as pair:
        assert "certificate is not accepted" in pair.failure()


def test_a_sender_with_a_certificate_for_another_host_is_not_believed(authority: Authority, files: Files) -> None:
    elsewhere = authority.files("elsewhere", "10.0.0.7", "127.0.0.1")
    with Pair(elsewhere, files) as pair:
        endpoint = pair.sending.endpoint.replace("127.0.0.1", "localhost")
        assert "not valid for 'localhost'" in pair.failure(endpoint)
        pair.transfer()


def test_a_part_whose_certificate_is_not_for_its_own_host_does_not_start(authority: Authority) -> None:
    files = authority.files("nowhere", "10.0.0.7")
    with certified(files), pytest.raises(TlsFailed, match=r"cannot verify the control port at 127\.0\.0\.1"):
        SendManager(LAYOUT, [TcpTransport()])


def test_an_expired_certificate_ends_the_start(authority: Authority) -> None:
    files = authority.files("late", expired=True)
    with certified(files), pytest.raises(TlsFailed, match=r"late\.pem .*certificate has expired"):
        SendManager(LAYOUT, [TcpTransport()])


def test_a_receiver_without_a_certificate_is_told_at_once(files: Files) -> None:
    with Pair(files, None) as pair:
        assert "this end has no certificate" in pair.failure()


def is_refused(caplog: pytest.LogCaptureFixture, why: str) -> None:
    """Waits until the log names the peer that was refused, and why. The peer may know it earlier."""
    eventually(lambda: any("a peer at 127.0.0.1" in line and why in line for line in caplog.messages))


def test_plain_text_to_a_tls_port_is_told_to_both(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    """The receiver was given an address without TLS."""
    with Pair(files, None) as pair:
        assert "demands TLS, and this end does not" in pair.failure(pair.sending.endpoint.replace("tls:", "tcp:"))
        is_refused(caplog, "does not speak TLS")


def test_tls_to_a_plain_port_is_told_to_both(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    with Pair(None, files) as pair:
        assert "the other end does not speak TLS" in pair.failure()
        is_refused(caplog, "demands TLS")


@pytest.mark.parametrize("required", [(True, False), (False, True), (False, False)])
def test_parts_that_do_not_require_tls_work_with_those_that_do(files: Files, required: tuple[bool, bool]) -> None:
    with Pair(files, files, required=required) as pair:
        pair.transfer()


@pytest.mark.parametrize("certified_end", [0, 1])
def test_a_part_that_does_not_require_tls_works_with_one_that_has_no_certificate(
    files: Files, certified_end: int
) -> None:
    ends: list[Files | None] = [None, None]
    ends[certified_end] = files
    with Pair(ends[0], ends[1], required=(False, False)) as pair:
        pair.transfer()


def test_certificates_and_ca_are_renewed_while_a_pair_works(tmp_path: Path) -> None:
    """Connections that are there go on, and new ones use the new files: of another CA, so that no others would do."""
    old, new = (Authority.make(tmp_path / name) for name in ("old", "new"))
    parts = [old.files(name) for name in ("sender", "receiver")]
    with Pair(parts[0], parts[1]) as pair:
        pair.transfer()
        for part, name in zip(parts, ("sender", "receiver"), strict=True):
            _, cert, key = new.files(name)
            os.replace(key, part[2])
            os.replace(cert, part[1])
        os.replace(new.ca, old.ca)
        pair.transfer()
        pair.reconnect()
        pair.transfer()
