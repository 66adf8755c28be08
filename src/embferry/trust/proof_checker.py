"""Checks the proofs of the requests to an HTTP server, and logs wrong keys, at most once a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

from .keys import ClusterKeys
from .refusals import Refusals
from .requests import Accepted, Reason, Refused, Verifier

WHY: dict[Reason, str] = {
    "proof_required": "this request needs a proof of the cluster key",
    "nonce_unknown": "the proof is for an earlier nonce; prove the request again with the one of this answer",
    "count_used": "a request with this proof has arrived before; prove the request again",
    "wrong_key": "the proof is not one of this request under this server's cluster key; give both the same key file",
}
"""Text of a refusal."""


class ProofChecker:
    """The proofs of the requests to one server. Not thread-safe.

    Args:
        keys: The cluster's.
        context: What the server is, as its clients know it (:class:`~embferry.trust.requests.Verifier`).
        name: The server, for the log: "the bootstrap server".
        now: A monotonic clock, in seconds.
    """

    def __init__(self, keys: ClusterKeys, context: bytes, name: str, now: Callable[[], float] = time.monotonic) -> None:
        self._verifier = Verifier(keys.accepted, context)
        self._refusals = Refusals(name, "a request", now)

    def check(
        self, method: str, target: str, authorization: str | None, digest: str | None, address: str
    ) -> Accepted | Refused:
        """Checks a request's proof; the arguments are those of :meth:`Verifier.check`, and the client's address."""
        verdict = self._verifier.check(method, target, authorization, digest)
        if isinstance(verdict, Refused) and verdict.reason == "wrong_key":
            self._refusals.report(address, "it was proved with a wrong cluster key")
        return verdict
