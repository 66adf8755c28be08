"""The greeting with one check taken out, and the attacks that then succeed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from embferry.trust import Key, Trust, greeting
from embferry.trust.greeting import LABEL, PROOF_BYTES, Channel, Greeting, Role

from .greetings import (
    FOREIGN,
    a_key_that_was_replaced,
    a_proof_moved_to_another_port,
    a_recording_of_a_dialer,
    a_recording_of_an_acceptor,
    all_bytes_returned,
    an_acceptor_that_speaks_first,
    an_answer_without_a_key,
    an_end_without_a_key,
    another_channel_without_keys,
    another_protocol,
    another_role_without_keys,
    another_version,
    changed_hellos,
    proofs_under_a_foreign_key,
    proofs_without_a_key,
    the_keys_taken_out_of_the_hellos,
    the_own_proof_returned,
    unknown_flags,
)

Mutate = Callable[[pytest.MonkeyPatch], None]
Caught = tuple[Callable[[], None], ...]
MUTANTS: dict[str, tuple[Mutate, Caught]] = {}


def mutant(*caught_by: Callable[[], None]) -> Callable[[Mutate], Mutate]:
    def register(mutate: Mutate) -> Mutate:
        MUTANTS[mutate.__name__] = mutate, caught_by
        return mutate

    return register


def _proof_without(patch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Leaves the bytes ``first`` to ``last`` of both hellos out of the proofs."""

    def proof(key: Key, prover: Role, *hellos: bytes) -> bytes:
        return key.mac(LABEL, bytes([prover]), *(hello[:first] + hello[last:] for hello in hellos))

    patch.setattr(greeting, "proof", proof)


@mutant(a_recording_of_a_dialer, a_recording_of_an_acceptor, changed_hellos)
def nonces_are_not_in_the_proof(patch: pytest.MonkeyPatch) -> None:
    _proof_without(patch, 8, 40)


@mutant(a_recording_of_a_dialer, a_recording_of_an_acceptor)
def nonces_are_not_fresh(patch: pytest.MonkeyPatch) -> None:
    def of_trust(self: Trust, role: Role, channel: Channel) -> Greeting:
        return Greeting(role, channel, () if self.keys is None else self.keys.accepted(), bytes([role]) * 32)

    patch.setattr(Trust, "greeting", of_trust)


@mutant(a_proof_moved_to_another_port, changed_hellos)
def the_channel_is_not_in_the_proof(patch: pytest.MonkeyPatch) -> None:
    _proof_without(patch, 6, 7)


@mutant(changed_hellos)
def flags_are_not_in_the_proof(patch: pytest.MonkeyPatch) -> None:
    _proof_without(patch, 5, 6)


@mutant(changed_hellos)
def the_version_is_not_in_the_proof(patch: pytest.MonkeyPatch) -> None:
    _proof_without(patch, 4, 5)


@mutant(the_own_proof_returned, changed_hellos)
def the_role_is_not_in_the_proof(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(greeting, "proof", lambda key, prover, *hellos: key.mac(LABEL, *hellos))


@mutant(proofs_under_a_foreign_key)
def the_key_is_not_in_the_proof(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(greeting, "proof", lambda key, prover, *hellos: FOREIGN.mac(LABEL, bytes([prover]), *hellos))


def _check_hello_without(patch: pytest.MonkeyPatch, at: int, right: Callable[[Greeting], int]) -> None:
    """Has an end take any value for the byte ``at`` of the peer's hello."""
    real = Greeting._on_hello

    def on_hello(self: Greeting, hello: bytes) -> bytes:
        corrected = bytearray(hello)
        corrected[at] = right(self)
        with pytest.MonkeyPatch.context() as inner:
            check = greeting.check_hello
            inner.setattr(greeting, "check_hello", lambda _, *rest, **more: check(bytes(corrected), *rest, **more))
            return real(self, hello)

    patch.setattr(Greeting, "_on_hello", on_hello)


@mutant(another_version)
def every_version_is_taken(patch: pytest.MonkeyPatch) -> None:
    _check_hello_without(patch, 4, lambda _: greeting.VERSION)


@mutant(an_end_without_a_key, unknown_flags)
def all_flags_are_taken(patch: pytest.MonkeyPatch) -> None:
    _check_hello_without(patch, 5, lambda end: int(bool(end._keys)))


@mutant(another_channel_without_keys)
def every_channel_is_taken(patch: pytest.MonkeyPatch) -> None:
    _check_hello_without(patch, 6, lambda end: end._channel)


@mutant(another_role_without_keys, all_bytes_returned)
def every_role_is_taken(patch: pytest.MonkeyPatch) -> None:
    _check_hello_without(patch, 7, lambda end: end._role.other)


@mutant(another_protocol)
def every_protocol_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(greeting, "MAGIC", type("Any", (bytes,), {"startswith": lambda *_: True})(greeting.MAGIC))


def _trusting(self: Greeting, proofs: Sequence[bytes], prover: Role) -> Key:
    return self._keys[0]


@mutant(proofs_without_a_key, proofs_under_a_foreign_key, an_answer_without_a_key, a_recording_of_a_dialer)
def no_proof_is_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Greeting, "_proven_key", _trusting)


@mutant(an_answer_without_a_key, a_recording_of_an_acceptor, the_own_proof_returned)
def every_answer_is_taken(patch: pytest.MonkeyPatch) -> None:
    def on_answer(self: Greeting, answer: bytes) -> bytes:
        self.done = True
        return b""

    patch.setattr(Greeting, "_on_answer", on_answer)


@mutant(the_keys_taken_out_of_the_hellos, an_end_without_a_key)
def a_peer_without_a_key_needs_none(patch: pytest.MonkeyPatch) -> None:
    real = Greeting._on_hello

    def on_hello(self: Greeting, hello: bytes) -> bytes:
        if hello[5]:
            return real(self, hello)
        self.done = True
        return b""

    patch.setattr(Greeting, "_on_hello", on_hello)


@mutant(a_key_that_was_replaced)
def the_answer_is_constant(patch: pytest.MonkeyPatch) -> None:
    real = Greeting._on_proofs
    patch.setattr(Greeting, "_on_proofs", lambda self, proofs: real(self, proofs) and b"\x07" * PROOF_BYTES)


@mutant(an_acceptor_that_speaks_first)
def the_acceptor_proves_first(patch: pytest.MonkeyPatch) -> None:
    real = Greeting._on_hello

    def on_hello(self: Greeting, hello: bytes) -> bytes:
        said = real(self, hello)
        return self._proof(self._keys[0], Role.ACCEPTOR) if self._role is Role.ACCEPTOR and self._keys else said

    patch.setattr(Greeting, "_on_hello", on_hello)


@mutant(a_key_that_was_replaced)
def the_dialer_proves_under_its_current_key_only(patch: pytest.MonkeyPatch) -> None:
    real = Greeting._on_hello

    def on_hello(self: Greeting, hello: bytes) -> bytes:
        return real(self, hello)[:PROOF_BYTES] * 2

    patch.setattr(Greeting, "_on_hello", on_hello)


@mutant(a_key_that_was_replaced)
def the_acceptor_answers_under_its_current_key(patch: pytest.MonkeyPatch) -> None:
    real = Greeting._on_proofs

    def on_proofs(self: Greeting, proofs: bytes) -> bytes:
        real(self, proofs)
        return self._proof(self._keys[0], Role.ACCEPTOR)

    patch.setattr(Greeting, "_on_proofs", on_proofs)


@mutant(a_key_that_was_replaced)
def the_acceptor_takes_its_current_key_only(patch: pytest.MonkeyPatch) -> None:
    real = Greeting._proven_key

    def proven_key(self: Greeting, proofs: Sequence[bytes], prover: Role) -> Key | None:
        found = real(self, proofs, prover)
        return found if found == self._keys[0] else None

    patch.setattr(Greeting, "_proven_key", proven_key)
