"""Every part of a proof, and of what a server remembers, is needed: without it, something that must hold does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from embferry.trust import requests
from embferry.trust.keys import Key
from embferry.trust.requests import MAX_CLIENTS, WINDOW, Accepted, Verifier

from .test_requests import HOLDS, KEY

_proof, _check, _take = requests._proof, Verifier.check, requests._Counts.take
Mutate = Callable[[pytest.MonkeyPatch], None]


def without_parts(*parts: int) -> Mutate:
    """Leaves parts of the message out of every proof: the context is 0, then nonce, client, count, and the rest."""

    def proof(key: Key, label: bytes, *covered: bytes) -> str:
        return _proof(key, label, *(part for at, part in enumerate(covered) if at not in parts))

    return lambda patch: patch.setattr(requests, "_proof", proof)


def without_lengths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests, "_proof", lambda key, label, *covered: _proof(key, label, b"".join(covered)))


def one_label(patch: pytest.MonkeyPatch) -> None:
    """A server would then prove its answers with what the client has sent, if the texts agree."""
    patch.setattr(requests, "_proof", lambda key, label, *covered: _proof(key, b"", *covered[:4]))


def nothing_is_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests, "_equal", lambda expected, given: True)


def any_count_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests._Counts, "take", lambda self, count: True)


def only_rising_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests._Counts, "take", lambda self, count: count > self._highest and _take(self, count))


def a_longer_window_is_not_remembered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests._Counts, "take", lambda self, count: self._highest - count == WINDOW or _take(self, count))


def any_nonce(patch: pytest.MonkeyPatch) -> None:
    def check(self: Verifier, method: str, target: str, authorization: str | None, digest: str | None) -> object:
        before, parts = self._nonce, (authorization or "").split('"')
        if len(parts) > 1:
            self._nonce = parts[1]
        verdict = _check(self, method, target, authorization, digest)
        self._nonce = before
        return verdict

    patch.setattr(Verifier, "check", check)


def no_eviction(patch: pytest.MonkeyPatch) -> None:
    def check(self: Verifier, *request: str | None) -> object:
        self._max_clients = MAX_CLIENTS
        return _check(self, *request)  # type: ignore[arg-type]

    patch.setattr(Verifier, "check", check)


def a_full_table_keeps_its_nonce(patch: pytest.MonkeyPatch) -> None:
    def check(self: Verifier, *request: str | None) -> object:
        before = self._nonce
        verdict = _check(self, *request)  # type: ignore[arg-type]
        self._nonce = before
        return verdict

    patch.setattr(Verifier, "check", check)


def strangers_are_remembered(patch: pytest.MonkeyPatch) -> None:
    def check(self: Verifier, method: str, target: str, authorization: str | None, digest: str | None) -> object:
        match = requests._AUTHORIZATION.fullmatch(authorization or "")
        if match is not None:
            self._clients.setdefault(match[2], requests._Counts())
        return _check(self, method, target, authorization, digest)

    patch.setattr(Verifier, "check", check)


def only_the_first_key(patch: pytest.MonkeyPatch) -> None:
    def check(self: Verifier, *request: str | None) -> object:
        accepted = self._accepted_keys
        self._accepted_keys = lambda: accepted()[:1]
        try:
            return _check(self, *request)  # type: ignore[arg-type]
        finally:
            self._accepted_keys = accepted

    patch.setattr(Verifier, "check", check)


def the_answer_s_proof_is_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(requests.ProvedRequest, "is_answered_by", lambda *_: True)


def answers_under_the_first_key(patch: pytest.MonkeyPatch) -> None:
    def answer_proof(self: Accepted, status: int, digest: str | None = None) -> str:
        return replace(self._exchange, key=KEY).answer_proof(status, digest)

    patch.setattr(Accepted, "answer_proof", answer_proof)


MUTANTS: dict[str, Mutate] = {
    "without_the_context": without_parts(0),
    "without_the_nonce": without_parts(1),
    "without_the_client": without_parts(2),
    "without_the_count": without_parts(3),
    "without_the_method_and_the_status": without_parts(4),
    "without_the_target_and_the_digest_of_the_answer": without_parts(5),
    "without_the_digest": without_parts(6),
    **{
        mutant.__name__: mutant
        for mutant in (
            without_lengths,
            one_label,
            nothing_is_compared,
            any_count_is_taken,
            only_rising_counts,
            a_longer_window_is_not_remembered,
            any_nonce,
            no_eviction,
            a_full_table_keeps_its_nonce,
            strangers_are_remembered,
            only_the_first_key,
            the_answer_s_proof_is_not_compared,
            answers_under_the_first_key,
        )
    },
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_program_without_one_part_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    caught = []
    for holds in HOLDS:
        try:
            holds()
        except AssertionError:
            caught.append(holds.__name__)
    assert caught
