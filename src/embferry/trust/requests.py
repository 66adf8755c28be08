"""Proofs of the cluster key for HTTP requests and their answers. Pure: no sockets, no clock.

The server has a nonce. A request without it gets 401 and the nonce::

    WWW-Authenticate: Embferry nonce="…", reason="proof_required"

A client has a nonce too, and a counter. It sends the request again with a proof::

    Authorization: Embferry nonce="…", client="…", count=1, proof="…"

The proof is an HMAC-SHA-256 under the cluster key. It covers both nonces, the count, the method, the target and the
value of ``Content-Digest``, so a body is covered if the server compares it with that. The answer has a proof of its
own, over the same nonces and count, the status and the ``Content-Digest`` of the answer::

    Embferry-Proof: …

The server remembers which counts of a client it has accepted, so each proof is accepted once. Only clients with the key
have a place in its table. When the table is full, the server draws a new nonce, which ends every earlier proof.

Both proofs cover a context, which both ends know and none sends: what the server is, and a secret of it if it has one.
So the proof for one server is worth nothing at another.
"""

from __future__ import annotations

import hmac
import itertools
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from .keys import Key

SCHEME = "Embferry"
PROOF_HEADER = "Embferry-Proof"
NONCE_BYTES = 16
MAX_CLIENTS = 4096
WINDOW = 1024
"""Counts below a client's highest that may still arrive: requests at once overtake each other on their connections."""
MAX_CHALLENGES = 3
"""Times that a client proves one request: after this many challenges it gives up."""
BOOTSTRAP, ROUTER, INSTANCE = b"bootstrap", b"router", b"instance of vllm"
"""Contexts of the servers that have no secret of their own."""

Reason = Literal["proof_required", "nonce_unknown", "count_used", "wrong_key"]
"""Why a request is refused: it has no proof; its proof is for an earlier nonce; a request with its count was accepted
before, or too many later ones were; the proof is not one of this request under an accepted key."""

_REQUEST = b"embferry request 1"
_ANSWER = b"embferry answer 1"
_STREAM = b"embferry stream 1"
_AUTHORIZATION = re.compile(
    rf'{SCHEME} nonce="([0-9a-f]{{32}})", client="([0-9a-f]{{32}})", count=([1-9][0-9]{{0,17}}), '
    r'proof="([0-9a-f]{64})"'
)
_CHALLENGE = re.compile(
    rf'{SCHEME} nonce="([0-9a-f]{{32}})", reason="(proof_required|nonce_unknown|count_used|wrong_key)"'
)


def _proof(key: Key, label: bytes, *parts: bytes) -> str:
    return key.mac(label, *parts).hex()


@dataclass(frozen=True, slots=True)
class _Exchange:
    """The common part of the proofs of a request and of its answer."""

    key: Key
    context: bytes = field(repr=False)
    nonce: str
    client: str
    count: int

    def request_proof(self, method: str, target: str, digest: str | None) -> str:
        return self._proof(_REQUEST, method, target, digest)

    def answer_proof(self, status: int, digest: str | None) -> str:
        return self._proof(_ANSWER, str(status), digest)

    def stream_secret(self) -> str:
        return self._proof(_STREAM)

    def _proof(self, label: bytes, *texts: str | None) -> str:
        covered = (self.nonce, self.client, str(self.count), *texts)
        return _proof(
            self.key, label, self.context, *((text or "").encode("utf-8", "surrogateescape") for text in covered)
        )


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request whose proof holds."""

    _exchange: _Exchange

    def answer_proof(self, status: int, digest: str | None = None) -> str:
        """Returns the value of :data:`PROOF_HEADER` for an answer, whose ``Content-Digest`` is ``digest``."""
        return self._exchange.answer_proof(status, digest)

    def stream_secret(self) -> str:
        """Returns a secret that only both ends of this request know, for the checks of an answer that is streamed."""
        return self._exchange.stream_secret()


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that is answered with 401.

    Attributes:
        challenge: The value of ``WWW-Authenticate``.
    """

    reason: Reason
    challenge: str


class Verifier:
    """The server's end. Not thread-safe.

    Args:
        accepted_keys: Returns the keys under which a client may prove itself. Asked at each request.
        context: What the server is, as its clients know it.
        draw: Returns that many random bytes.
        max_clients: Clients that are remembered.
    """

    def __init__(
        self,
        accepted_keys: Callable[[], Sequence[Key]],
        context: bytes,
        *,
        draw: Callable[[int], bytes] = secrets.token_bytes,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        self._accepted_keys, self._context = accepted_keys, context
        self._draw, self._max_clients = draw, max_clients
        self._nonce = draw(NONCE_BYTES).hex()
        self._clients: dict[str, _Counts] = {}

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._clients)

    def check(self, method: str, target: str, authorization: str | None, digest: str | None) -> Accepted | Refused:
        """Checks the proof of a request, and accepts it once.

        Args:
            method: The request's method.
            target: Its target, as the client has written it.
            authorization: The value of its ``Authorization``.
            digest: The value of its ``Content-Digest``. If the request has a body, the caller compares the two.
        """
        match = _AUTHORIZATION.fullmatch(authorization or "")
        if match is None:
            return self._refused("proof_required")
        nonce, client, count, proof = match[1], match[2], int(match[3]), match[4]
        if nonce != self._nonce:
            return self._refused("nonce_unknown")
        exchange = self._proved(nonce, client, count, proof, (method, target, digest))
        if exchange is None:
            return self._refused("wrong_key")
        counts = self._clients.get(client)
        if counts is None:
            if len(self._clients) >= self._max_clients:
                self._clients.clear()
                self._nonce = self._draw(NONCE_BYTES).hex()
                return self._refused("nonce_unknown")
            counts = self._clients[client] = _Counts()
        return Accepted(exchange) if counts.take(count) else self._refused("count_used")

    def is_proved(self, method: str, target: str, authorization: str | None, digest: str | None) -> bool:
        """Returns whether a request is proved under an accepted key, perhaps for an earlier nonce.

        Such a proof lets no request in. The arguments are those of :meth:`check`.
        """
        match = _AUTHORIZATION.fullmatch(authorization or "")
        return match is not None and bool(
            self._proved(match[1], match[2], int(match[3]), match[4], (method, target, digest))
        )

    def _proved(
        self, nonce: str, client: str, count: int, proof: str, request: tuple[str, str, str | None]
    ) -> _Exchange | None:
        for key in self._accepted_keys():
            exchange = _Exchange(key, self._context, nonce, client, count)
            if _equal(exchange.request_proof(*request), proof):
                return exchange
        return None

    def _refused(self, reason: Reason) -> Refused:
        return Refused(reason, f'{SCHEME} nonce="{self._nonce}", reason="{reason}"')


class _Counts:
    """The counts of one client that have been accepted: the highest, and a bit for each of the window below it."""

    __slots__ = ("_highest", "_taken")

    def __init__(self) -> None:
        self._highest = self._taken = 0

    def take(self, count: int) -> bool:
        """Takes ``count``. Returns False if it was taken before, or is too old to tell."""
        if count > self._highest:
            self._taken = (self._taken << min(count - self._highest, WINDOW) | 1) & ((1 << WINDOW) - 1)
            self._highest = count
            return True
        bit = 1 << (self._highest - count) if self._highest - count < WINDOW else 0
        if not bit or self._taken & bit:
            return False
        self._taken |= bit
        return True


@dataclass(frozen=True, slots=True)
class ProvedRequest:
    """A request as the client sends it.

    Attributes:
        authorization: The value of ``Authorization``.
    """

    authorization: str
    _exchange: _Exchange | None = None

    def is_answered_by(self, status: int, digest: str | None, proof: str | None) -> bool:
        """Returns whether an answer to this request is proved.

        Args:
            status: The answer's status.
            digest: The value of its ``Content-Digest``. If the answer has one, the caller compares the body with it.
            proof: The value of its :data:`PROOF_HEADER`.
        """
        exchange = self._exchange
        return exchange is not None and proof is not None and _equal(exchange.answer_proof(status, digest), proof)

    def stream_secret(self) -> str:
        """Returns the secret of :meth:`Accepted.stream_secret`; empty for a request without a proof."""
        return "" if self._exchange is None else self._exchange.stream_secret()


class Prover:
    """The client's end, for one server. Thread-safe.

    Args:
        current_key: Returns the key to prove. Asked at each request.
        context: What the server is, as it knows it itself.
        draw: Returns that many random bytes.

    Attributes:
        has_nonce: Whether the server has answered with a challenge before. A request without its nonce is refused by a
            server with a key, but carried out by a server without one: the first request must be one that may be.
    """

    def __init__(
        self,
        current_key: Callable[[], Key],
        context: bytes,
        *,
        draw: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._current_key, self._context = current_key, context
        self._nonce = ""
        self._client = draw(NONCE_BYTES).hex()
        self._counts = itertools.count(1)

    @property
    def has_nonce(self) -> bool:
        return bool(self._nonce)

    def prove(self, method: str, target: str, digest: str | None = None) -> ProvedRequest:
        """Returns the proof of a request; each one has to be sent once only. Without a nonce it asks for one."""
        nonce = self._nonce
        if not nonce:
            return ProvedRequest(SCHEME)
        count = next(self._counts)  # another one for each thread
        exchange = _Exchange(self._current_key(), self._context, nonce, self._client, count)
        proof = exchange.request_proof(method, target, digest)
        authorization = f'{SCHEME} nonce="{nonce}", client="{self._client}", count={count}, proof="{proof}"'
        return ProvedRequest(authorization, exchange)

    def on_challenge(self, challenge: str | None) -> Reason | None:
        """Takes the nonce of an answer with status 401.

        Returns:
            Why the request was refused: unless it is ``wrong_key``, it may be proved and sent again, at most
            :data:`MAX_CHALLENGES` times. None if ``challenge``, the value of ``WWW-Authenticate``, is of another kind.
        """
        read = read_challenge(challenge)
        if read is None:
            return None
        self._nonce, reason = read
        return reason


def read_challenge(challenge: str | None) -> tuple[str, Reason] | None:
    """Returns nonce and reason of a value of ``WWW-Authenticate``, None if it is of another kind."""
    match = _CHALLENGE.fullmatch(challenge or "")
    return None if match is None else (match[1], cast("Reason", match[2]))


def _equal(expected: str, given: str) -> bool:
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogateescape"))
