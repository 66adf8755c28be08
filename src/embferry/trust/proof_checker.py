"""Checks the proofs of the requests to an HTTP server, and logs those of strangers, one a minute for each reason."""

from __future__ import annotations

import time
from collections.abc import Callable

from .keys import ClusterKeys
from .refusals import Refusals
from .requests import SCHEME, Accepted, Reason, Refused, Verifier

WHY: dict[Reason, str] = {
    "proof_required": "this request needs a proof of the cluster key",
    "nonce_unknown": "the proof is for an earlier nonce; prove the request again with the one of this answer",
    "count_used": "a request with this proof has arrived before; prove the request again",
    "wrong_key": "the proof is not one of this request under this server's cluster key; give both the same key file",
}
"""Text of a refusal."""
_OF_STRANGERS: dict[Reason, str] = {
    "proof_required": "it has no proof of the cluster key",
    "count_used": "a request with its proof has arrived before",
    "wrong_key": "it was proved with a wrong cluster key",
}
"""Why a request is of no part of the cluster, for the log."""


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
        if isinstance(verdict, Refused) and (
            why := self._suspicion(verdict.reason, method, target, authorization, digest)
        ):
            self._refusals.report(address, why)
        return verdict

    def _suspicion(
        self, reason: Reason, method: str, target: str, authorization: str | None, digest: str | None
    ) -> str | None:
        """Returns why a refused request is of a stranger, or None if parts of the cluster send such ones too."""
        if reason == "proof_required" and method == "GET" and authorization == SCHEME:
            return None  # a part that asks for a nonce
        if reason == "nonce_unknown" and not self._verifier.is_proved(method, target, authorization, digest):
            return _OF_STRANGERS["wrong_key"]  # otherwise this server has started since
        return _OF_STRANGERS.get(reason)
