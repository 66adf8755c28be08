"""The requests that one proved call takes, for clients of any kind. Pure: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from embferry.protocol.errors import TransportError, WrongKey

from .digests import CONTENT_DIGEST
from .requests import MAX_CHALLENGES, PROOF_HEADER, SCHEME, Prover, read_challenge

GREETING_PATH = "/health"

Answer = tuple[int, Callable[[str], str | None]]
"""Status of an answer, and a function that returns the value of one of its header fields, or None."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request to send.

    Attributes:
        authorization: The value of ``Authorization``; None: none.
        is_greeting: Whether it is a ``GET`` of :data:`GREETING_PATH` without a body, instead of the call's own.
        stream_secret: For the checks of an answer that is streamed.
    """

    authorization: str | None = None
    is_greeting: bool = False
    stream_secret: str = ""


def proved_call(
    prover: Prover | None, method: str, target: str, digest: str | None, server: str, *, must_prove: bool = True
) -> Generator[Attempt, Answer, None]:
    """Yields the requests of one call, one after the other; takes the answer of each. The last answer is the call's.

    A new client greets the server first: a server without a key would carry out the call itself. A valid answer is
    proved, with its ``Content-Digest``: if it has one, the caller compares the body with that.

    Args:
        prover: Proves the cluster key; None without one.
        method: The call's method.
        target: Its target.
        digest: The value of its ``Content-Digest``.
        server: The server, for the texts of errors.
        must_prove: Whether a server without a cluster key is refused if this end has one.

    Raises:
        WrongKey: The server has another cluster key, or one of both has none.
        TransportError: An answer is not proved.
    """
    if prover is not None and not prover.has_nonce:
        status, header = yield Attempt(SCHEME, is_greeting=True)
        if status != 200:
            _take_challenge(prover, status, header, server)
        elif must_prove:
            raise WrongKey(f"{server} has no cluster key, and this end has one")
        else:
            prover = None
    if prover is None:
        status, header = yield Attempt()
        if status == 401 and read_challenge(header("www-authenticate")) is not None:
            raise WrongKey(f"{server} asks for a cluster key, and this end has none")
        return
    for _ in range(MAX_CHALLENGES):
        proved = prover.prove(method, target, digest)
        status, header = yield Attempt(proved.authorization, stream_secret=proved.stream_secret())
        is_answer = proved.is_answered_by(status, header(CONTENT_DIGEST.lower()), header(PROOF_HEADER.lower()))
        if is_answer:  # perhaps with a 401 of the application behind
            return
        if status != 401:
            raise TransportError(f"the answer of {server} with status {status} has no proof of the cluster key")
        _take_challenge(prover, status, header, server)
    raise TransportError(f"{server} asks for a new proof again and again")


def _take_challenge(prover: Prover, status: int, header: Callable[[str], str | None], server: str) -> None:
    reason = prover.on_challenge(header("www-authenticate"))
    if reason is None:
        raise TransportError(f"{server} answered with status {status} instead of a challenge")
    if reason == "wrong_key":
        why = "has another cluster key, or the request was changed on its way; give both the same key file"
        raise WrongKey(f"{server} {why}")
