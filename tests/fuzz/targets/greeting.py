"""The greeting at the start of a byte stream: without a right proof, no peer gets through either end."""

from __future__ import annotations

from random import Random

from embferry.protocol.errors import TransportError, WrongKey
from embferry.trust.greeting import HELLO, MAGIC, PROOF_BYTES, Channel, Greeting, Role, proof
from embferry.trust.keys import Key

from ..doubles import arrivals
from ..engine import Target
from ..raw import Pieces
from ..tree import Number, Tree, packed

KEYS = (Key(b"k" * 32), Key(b"o" * 32))
OURS, THEIRS = b"a" * 32, b"d" * 32


class GreetingTarget(Target):
    documented = (WrongKey, TransportError)
    inputs = 5000

    def tree(self, chance: Random) -> Tree:
        role = chance.choice(tuple(Role))
        ours = Greeting(role, Channel.CONTROL, KEYS, OURS).hello
        hello = [MAGIC, Number(1, 1), Number(1, 1), Number(Channel.CONTROL, 1), Number(role.other, 1), THEIRS]
        hellos = (packed(hello), ours) if role is Role.ACCEPTOR else (ours, packed(hello))
        proofs = [proof(key, role.other, *hellos) for key in KEYS]
        return [hello, proofs if role is Role.ACCEPTOR else proofs[:1]]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        stream = packed(tree)
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4))])

    def run(self, pieces: Pieces) -> None:
        stream = b"".join(pieces)
        is_dialer = stream[7:8] != bytes([Role.ACCEPTOR])
        role = Role.ACCEPTOR if is_dialer else Role.DIALER
        apart, error = _greeted(role, pieces)
        whole, error_of_whole = _greeted(role, [stream])
        assert (apart.done, str(error)) == (whole.done, str(error_of_whole)), "the outcome depends on the arrivals"
        if apart.done:
            _check_proof(role, apart.hello, stream)
        if error is not None:
            raise error
        if not apart.done:
            raise TransportError("the greeting is not complete")


def _greeted(role: Role, pieces: Pieces) -> tuple[Greeting, TransportError | None]:
    greeting, stream = Greeting(role, Channel.CONTROL, KEYS, OURS), b""
    try:
        for piece in pieces:
            stream += piece
            while stream and greeting.wanted:
                now, stream = stream[: greeting.wanted], stream[greeting.wanted :]
                greeting.receive(now)
    except (TransportError, WrongKey) as error:
        assert not greeting.done, "done, and refused"
        return greeting, error
    return greeting, None


def _check_proof(role: Role, ours: bytes, stream: bytes) -> None:
    """Checks that a peer that got through has proved a key over the hellos of both."""
    theirs, rest = stream[: HELLO.size], stream[HELLO.size :]
    hellos = (theirs, ours) if role is Role.ACCEPTOR else (ours, theirs)
    shown = [
        rest[at : at + PROOF_BYTES] for at in range(0, (2 if role is Role.ACCEPTOR else 1) * PROOF_BYTES, PROOF_BYTES)
    ]
    right = [proof(key, role.other, *hellos) for key in KEYS]
    assert set(shown) & set(right), "a peer without a proof got through"
