"""TLS on a socket of the event loop, with the methods of a socket that connections use.

OpenSSL works on memory here, not on the descriptor: one system call moves many records, and it is known at any time
which bytes wait inside. So :meth:`TlsSocket.watch` asks the loop for three things more than a plain socket does: to
read, and to write if need be, during the handshake; and to call again while bytes that the kernel has delivered already
wait here, because the kernel reports nothing then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import Any

from embferry.protocol.errors import TlsFailed
from embferry.trust.tls import TLS_ALERT, fails_again, is_plain_text, reason_of

from .loop import READ, WRITE, Ready, Scope

RECORD_BYTES = 16 << 10
"""The longest record. What a call reads or writes is at least one of them."""
CALL_BYTES = 256 << 10
"""Bytes that one system call moves, and that one connection may hold encrypted."""
TURN_BYTES = 1 << 20
"""Bytes that one call of ``recvmsg_into`` takes."""
OVERHEAD_BYTES = 512
HANDSHAKE = 0x16


class _Scratch(threading.local):
    """Memory that every connection of a thread receives into."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(CALL_BYTES + OVERHEAD_BYTES))


_scratch = _Scratch()


class TlsError(ConnectionError):
    """TLS has failed on a connection, by what either end has or does. It would fail again.

    Attributes:
        failure: The error to report.
    """

    def __init__(self, failure: TlsFailed) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class TlsSocket:
    """A TLS stream over a connected, non-blocking socket. One thread at a time.

    A call raises BlockingIOError if it can do nothing now. A stream that ends without TLS's own end was cut off, by
    an attacker perhaps: that is a ConnectionError, where a plain socket would return nothing. As with OpenSSL's own
    calls, :meth:`send` after a BlockingIOError must be given the same bytes again, perhaps with more behind them.

    Args:
        sock: Connected, or connecting and not used before it is. Closed with this object.
        context: Of this end's role.
        server_side: Whether this end has accepted the connection.
        hostname: Name or address that the other end's certificate must have. Of the dialling end only.
        allow_plain: Passes everything through if the other end begins without TLS. Of the accepting end only.

    Raises:
        TlsError: ``hostname`` cannot be in a certificate.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None = None,
        allow_plain: bool = False,
    ) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname
            )
        except (ValueError, ssl.SSLError) as error:
            raise TlsError(TlsFailed(f"{hostname!r} cannot be verified by a certificate: {error}")) from error
        self._undecided, self._plain = allow_plain, False
        self._speaks_first, self._shaken = not server_side, False
        self._unsent = memoryview(b"")  # encrypted, and not yet taken by the kernel
        self._owed = 0  # bytes of the caller's in there
        self._peeked = bytearray()  # decrypted, and not yet received
        self._error: OSError | None = None
        self._process = os.getpid()
        self._closed = False
        self._watching: tuple[Scope, int, Ready] | None = None
        self._is_called = False  # for what waits inside

    @property
    def is_plain(self) -> bool:
        """Whether the other end has come without TLS."""
        return self._plain

    # As of a socket

    def fileno(self) -> int:
        return self._sock.fileno()

    def setsockopt(self, level: int, name: int, value: int) -> None:
        self._sock.setsockopt(level, name, value)

    def getsockopt(self, level: int, name: int) -> int:
        return self._sock.getsockopt(level, name)

    def getsockname(self) -> tuple[str, int]:
        return self._sock.getsockname()  # type: ignore[no-any-return]

    def getpeername(self) -> tuple[str, int]:
        return self._sock.getpeername()  # type: ignore[no-any-return]

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def settimeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def send(self, data: bytes | bytearray | memoryview) -> int:
        return self.sendmsg((data,))

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Sends everything. For sockets that block."""
        view = memoryview(data)
        while view.nbytes:
            view = view[self.send(view) :]

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        """Returns how many bytes the kernel has taken, encrypted; at most 256 KiB a call."""
        self._shake()
        if self._plain:
            return self._sock.sendmsg(buffers)
        if self._error is not None:
            raise self._error
        self._push()
        sent, self._owed = self._owed, 0
        if sent:
            return sent
        sent = self._encrypt(buffers)
        try:
            self._push()
        except BlockingIOError:
            self._owed = sent
            raise
        return sent

    def recv(self, count: int, flags: int = 0) -> bytes:
        """Returns what there is. ``flags``: 0 or MSG_PEEK, which leaves it here."""
        if flags & socket.MSG_PEEK:
            return self._peek(count)
        buffer = bytearray(min(count, RECORD_BYTES))
        received = self.recv_into(buffer)
        del buffer[received:]
        return bytes(buffer)

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        return self.recvmsg_into((buffer,))[0]

    def recvmsg_into(self, buffers: Sequence[bytearray | memoryview]) -> tuple[int, Any, int, Any]:
        """Fills buffers in order with what there is, up to 1 MiB. Only the first value of the result means anything."""
        self._shake()
        if self._plain:
            return self._sock.recvmsg_into(buffers)
        received = 0
        for buffer in buffers:
            view = memoryview(buffer)
            if self._peeked:
                count = min(view.nbytes, len(self._peeked))
                view[:count] = self._peeked[:count]
                del self._peeked[:count]
                received += count
                view = view[count:]
            while view.nbytes and received < TURN_BYTES:
                try:
                    count = self._decrypt(view)
                except OSError:
                    if received:
                        return received, [], 0, None  # the next call raises it again
                    raise
                if not count:
                    return received, [], 0, None
                received += count
                view = view[count:]
        return received, [], 0, None

    def shutdown(self, how: int) -> None:
        """Tells the other end that nothing more comes, in both ways. For the end of the process that made this."""
        self._say_end()
        self._sock.shutdown(how)

    def close(self) -> None:
        if not self._closed:
            self._say_end()
            self._closed = True
            self._watching = None
            self._sock.close()

    # Inside

    def _peek(self, count: int) -> bytes:
        self._shake()
        if self._plain:
            return self._sock.recv(count, socket.MSG_PEEK)
        if len(self._peeked) < count:
            more = bytearray(RECORD_BYTES)
            try:
                received = self._decrypt(memoryview(more))
            except OSError:
                if not self._peeked:
                    raise
                received = 0
            self._peeked += more[:received]
        return bytes(self._peeked[:count])

    def _say_end(self) -> None:
        """Sends TLS's end, if the kernel takes it now."""
        mine = self._process == os.getpid()  # in a forked child it would end the parent's stream
        if not (self._shaken and mine) or self._plain or self._closed or self._error is not None:
            return
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._push()

    def _shake(self) -> None:
        """Does what can be done of the handshake.

        Raises:
            BlockingIOError: It is not done.
            OSError: It has failed.
        """
        if self._shaken:
            return
        if self._error is not None:
            raise self._error
        if self._undecided:
            self._decide()
        self._speaks_first = False
        while not self._shaken:
            try:
                self._tls.do_handshake()
                self._shaken = True
            except ssl.SSLWantReadError:
                self._push()
                self._fill(RECORD_BYTES)
            except ssl.SSLError as error:
                self._fail(error, "the TLS handshake failed")
        with contextlib.suppress(BlockingIOError):
            self._push()

    def _decide(self) -> None:
        first = self._sock.recv(1, socket.MSG_PEEK)
        self._undecided = False
        if first and first[0] != HANDSHAKE:
            self._plain = self._shaken = True

    def _fail(self, error: ssl.SSLError, what: str) -> None:
        """Raises what the other calls will raise too, after an alert to the other end."""
        with contextlib.suppress(OSError):
            self._push()
            if is_plain_text(error):  # OpenSSL says nothing then
                self._sock.send(TLS_ALERT)
        if isinstance(error, ssl.SSLEOFError):
            during = "" if self._shaken else " during the TLS handshake; perhaps the other end does not speak TLS"
            self._error = ConnectionError(f"the connection was cut off{during}")
        elif fails_again(error):
            self._error = TlsError(TlsFailed(f"{what}: {reason_of(error)}"))
        else:
            self._error = ConnectionError(f"{what}: {reason_of(error)}")
        raise self._error from error

    def _encrypt(self, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        """Encrypts up to CALL_BYTES. Small buffers share a record."""
        taken, joined = 0, bytearray()
        try:
            for buffer in buffers:
                view = memoryview(buffer)[: CALL_BYTES - taken]
                taken += view.nbytes
                if joined or view.nbytes < RECORD_BYTES:
                    joined += view
                    if len(joined) >= RECORD_BYTES:
                        self._write(memoryview(joined))
                        joined = bytearray()
                else:
                    self._write(view)
                if taken >= CALL_BYTES:
                    break
            if joined:
                self._write(memoryview(joined))
        except ssl.SSLError as error:
            self._fail(error, "the TLS connection broke")
        return taken

    def _write(self, view: memoryview) -> None:
        while view.nbytes:
            view = view[self._tls.write(view) :]

    def _push(self) -> None:
        """Hands the kernel everything that is encrypted.

        Raises:
            BlockingIOError: Some of it is left.
        """
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def _decrypt(self, view: memoryview) -> int:
        """Returns the bytes of one record, or 0 at the end of the stream."""
        if self._error is not None:
            raise self._error
        while True:
            try:
                count = self._tls.read(view.nbytes, view)
            except ssl.SSLWantReadError:
                self._fill(view.nbytes)
                continue
            except ssl.SSLError as error:
                self._fail(error, "the TLS connection broke")
            if self._outgoing.pending:  # an answer of TLS itself
                with contextlib.suppress(BlockingIOError):
                    self._push()
            return int(count)

    def _fill(self, wanted: int) -> None:
        """Takes what the kernel has. Raises BlockingIOError if that is nothing."""
        scratch = _scratch.view[: max(RECORD_BYTES, min(wanted, CALL_BYTES)) + OVERHEAD_BYTES]
        received = self._sock.recv_into(scratch)
        if received:
            self._incoming.write(scratch[:received])
        else:
            self._incoming.write_eof()

    # The loop

    def watch(self, scope: Scope, events: int, ready: Ready) -> None:
        """Has ``ready`` called as :func:`.stream.watch` says."""
        self._watching = scope, events, ready
        self._arm()

    def unwatch(self) -> None:
        """Ends what :meth:`watch` began, but for the loop's part."""
        self._watching = None

    def _arm(self) -> None:
        if self._closed or self._watching is None:
            return
        scope, events, _ = self._watching
        if not self._shaken and self._error is None:
            wanted = READ | (WRITE if self._speaks_first or self._unsent or self._outgoing.pending else 0)
        else:
            wanted = events | (WRITE if self._unsent else 0)
        scope.watch(self._sock.fileno(), wanted, self._on_ready)
        held = self._shaken and (self._tls.pending() or self._incoming.pending or self._peeked)
        if held and events & READ and not self._is_called:
            self._is_called = True
            scope.call(self._again)

    def _again(self) -> None:
        self._is_called = False
        if not self._closed and self._watching is not None:
            self._on_ready(READ)

    def _on_ready(self, events: int) -> None:
        watching = self._watching
        if watching is None:
            return
        wanted = watching[1]
        if not self._shaken:
            try:
                self._shake()
            except BlockingIOError:
                self._arm()
                return
            except OSError as error:  # the next call of the connection raises it
                self._error = self._error or error
            events = wanted
        elif self._unsent and events & WRITE:
            with contextlib.suppress(OSError):  # reading or writing reports it
                self._push()
        if events & wanted:
            watching[2](events & wanted)
        if self._watching is watching:  # otherwise the connection has ended, or has said anew what it waits for
            self._arm()
