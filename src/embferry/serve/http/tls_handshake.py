"""TLS's handshake of a connection of an HTTP server, within the bounds on its connections.

asyncio's own server makes a protocol of a connection when the handshake is over: until then nothing would count it, and
any number of clients that never begin one could take every descriptor.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

from embferry.serve.http.connections import BoundedProtocol
from embferry.trust.refusals import Refusals
from embferry.trust.tls import fails_again, reason_of

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5
"""Seconds that a client may take for the handshake."""
END_SECONDS = 1
"""Seconds that a client may take for the end of TLS."""


class TlsHandshake(asyncio.Protocol):
    """A connection that was accepted: it takes a place, shakes hands, and passes itself on to the server's protocol.

    Args:
        kind: the class of the server's protocol.
        certificate: the context for TLS.
        refusals: gets the handshakes that fail by what the client has or does.
        arguments: of the server's protocol.
    """

    def __init__(
        self, kind: type[BoundedProtocol], certificate: ssl.SSLContext, refusals: Refusals, **arguments: Any
    ) -> None:
        self._refusals = refusals
        self._protocol, self._certificate = kind(**arguments), certificate
        self._received = bytearray()  # between the end of the handshake and the start of the protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # what arrives is for TLS
        if self._protocol.admit(transport):
            self._task = asyncio.get_running_loop().create_task(self._shake_hands(transport))

    def data_received(self, data: bytes) -> None:
        self._received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.leave()

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        encrypted = None
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport,
                self,
                self._certificate,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=END_SECONDS,
            )
        except OSError as error:
            log.debug("a handshake of TLS failed: %s", error)
            if isinstance(error, ssl.SSLError) and fails_again(error):
                address = (transport.get_extra_info("peername") or ("an unknown address",))[0]
                self._refusals.report(address, f"the TLS handshake failed: {reason_of(error)}")
        finally:
            if encrypted is None:
                self._protocol.leave()
        if encrypted is None or transport.is_closing():  # it was closed meanwhile, perhaps to make room
            self._protocol.leave()
            return
        encrypted.set_protocol(self._protocol)
        self._protocol.connection_made(encrypted)
        if self._received:
            self._protocol.data_received(bytes(self._received))
            self._received.clear()
