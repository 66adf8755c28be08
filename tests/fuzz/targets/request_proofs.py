"""``Authorization`` between parts, and the challenge of a server: only the request that was proved is accepted."""

from __future__ import annotations

from random import Random

from embferry.trust.keys import Key
from embferry.trust.requests import BOOTSTRAP, Prover, Refused, Verifier, read_challenge

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, packed

KEY = Key(b"k" * 32)
REQUEST = ("PUT", "/workers/a", "sha-256=:AAAA:")


class RefusedProofError(Exception):
    """The request was refused, as it should be."""


class RequestProofs(Target):
    documented = (RefusedProofError,)
    inputs = 3000

    def tree(self, chance: Random) -> Tree:
        _, value = _proved()
        fields = value.replace(",", ",\0").replace("=", "=\0").split("\0")
        return [fields, "\0", *[part + "\0" for part in REQUEST]]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(tree)]

    def run(self, pieces: Pieces) -> None:
        authorization, method, target, digest, *_ = (*b"".join(pieces).decode("latin-1").split("\0"), "", "", "", "")
        verifier, honest = _proved()
        answer = verifier.check(method, target, authorization, digest or None)
        read_challenge(authorization)
        if isinstance(answer, Refused):
            assert read_challenge(answer.challenge), "a challenge that no client can read"
            raise RefusedProofError(answer.reason)
        assert (authorization, method, target, digest) == (honest, *REQUEST), "another request than was proved"
        assert isinstance(verifier.check(method, target, authorization, digest), Refused), "a proof was accepted twice"


def _proved() -> tuple[Verifier, str]:
    """Returns a server and the header of the one request that it may accept."""
    verifier = Verifier(lambda: (KEY,), BOOTSTRAP, draw=bytes)
    prover = Prover(lambda: KEY, BOOTSTRAP, draw=bytes)
    challenge = verifier.check(*REQUEST[:2], None, None)
    assert isinstance(challenge, Refused)
    prover.on_challenge(challenge.challenge)
    return verifier, prover.prove(*REQUEST).authorization
