"""Proofs of requests: both ends without sockets, and an attacker who sees and changes everything between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.trust import requests
from embferry.trust.keys import Key
from embferry.trust.requests import WINDOW, Accepted, Prover, Refused, Verifier

KEY, OTHER = Key(bytes(range(32))), Key(bytes(32))
CONTEXT = b"bootstrap"


def drawn() -> Callable[[int], bytes]:
    """Returns a source of nonces, each another one."""
    numbers = itertools.count(1)
    return lambda count: next(numbers).to_bytes(count)


@dataclass(frozen=True)
class Sent:
    """A request on the wire."""

    method: str = "PUT"
    target: str = "/workers/w1"
    digest: str | None = "sha-256=:AAAA:"
    authorization: str | None = None


class Link:
    """A server and a client that has its nonce."""

    def __init__(
        self, accepted: tuple[Key, ...] = (KEY,), key: Key = KEY, context: bytes = CONTEXT, **options: int
    ) -> None:
        self.accepted, self.key = accepted, key
        self.server = Verifier(lambda: self.accepted, CONTEXT, draw=drawn(), **options)
        self.client = Prover(lambda: self.key, context)
        self.greet(self.client)

    def greet(self, client: Prover) -> None:
        refused = self.take(Sent(authorization=client.prove("GET", "/").authorization))
        assert isinstance(refused, Refused)
        assert refused.reason == "proof_required"
        assert client.on_challenge(refused.challenge) == "proof_required"
        assert client.has_nonce

    def take(self, sent: Sent) -> Accepted | Refused:
        return self.server.check(sent.method, sent.target, sent.authorization, sent.digest)

    def send(self, client: Prover | None = None, sent: Sent | None = None) -> Sent:
        """Returns the next request of the client."""
        sent = sent or Sent()
        proved = (client or self.client).prove(sent.method, sent.target, sent.digest)
        return replace(sent, authorization=proved.authorization)

    def verdict(self, sent: Sent) -> str:
        taken = self.take(sent)
        return taken.reason if isinstance(taken, Refused) else "accepted"


# What must hold. Each is run on the program, and in test_request_mutants.py on programs that lack a part.


def only_what_was_proved_is_accepted() -> None:
    """Each part of a request is covered; nothing can move from one part to the next."""
    link = Link()
    sent = link.send()
    changed = [
        replace(sent, method="DELETE"),
        replace(sent, target="/workers/w2"),
        replace(sent, digest="sha-256=:BBBB:"),
        replace(sent, digest=None),
        replace(sent, method="PUT/", target="workers/w1"),
        replace(sent, target="/workers/w1sha", digest="-256=:AAAA:"),
    ]
    assert [link.verdict(one) for one in changed] == ["wrong_key"] * len(changed)
    assert link.verdict(sent) == "accepted"


def a_proof_is_bound_to_the_server() -> None:
    assert Link(context=b"http" + bytes(16)).verdict(Link(context=b"http" + bytes(16)).send()) == "wrong_key"


def a_proof_is_accepted_once() -> None:
    link = Link()
    sent = link.send()
    assert [link.verdict(sent) for _ in range(2)] == ["accepted", "count_used"]


def a_proof_with_another_count_or_client_is_refused() -> None:
    link = Link()
    sent = link.send()
    text = sent.authorization or ""
    assert link.verdict(replace(sent, authorization=text.replace("count=1", "count=2"))) == "wrong_key"
    client = text.split('"')[3]
    assert link.verdict(replace(sent, authorization=text.replace(client, "0" * 32))) == "wrong_key"


def a_proof_for_an_earlier_nonce_is_refused() -> None:
    before, link = Link(), Link()
    link.server._nonce = "f" * 32
    sent = before.send()
    assert link.verdict(sent) == "nonce_unknown"
    nonce = (sent.authorization or "").split('"')[1]
    assert link.verdict(replace(sent, authorization=(sent.authorization or "").replace(nonce, "f" * 32))) == "wrong_key"


def requests_overtake_each_other_within_the_window_alone() -> None:
    link = Link()
    sent = [link.send() for _ in range(WINDOW + 1)]
    assert link.verdict(sent[WINDOW]) == "accepted"
    assert link.verdict(sent[0]) == "count_used"  # too far below the highest to tell
    assert [link.verdict(one) for one in sent[1:WINDOW]] == ["accepted"] * (WINDOW - 1)
    assert [link.verdict(one) for one in sent] == ["count_used"] * (WINDOW + 1)


def the_table_is_bounded_and_a_full_one_ends_every_proof() -> None:
    link = Link(max_clients=3)
    sent = link.send()
    assert link.verdict(sent) == "accepted"
    others = [Prover(lambda: KEY, CONTEXT) for _ in range(3)]
    for other in others:
        link.greet(other)
    late = link.send()
    assert [link.verdict(link.send(other)) for other in others] == ["accepted", "accepted", "nonce_unknown"]
    assert len(link.server) == 0
    assert [link.verdict(one) for one in (sent, late)] == ["nonce_unknown"] * 2
    taken = link.take(late)
    assert isinstance(taken, Refused)
    assert link.client.on_challenge(taken.challenge) == "nonce_unknown"
    assert link.verdict(link.send()) == "accepted"


def strangers_take_no_place() -> None:
    link = Link(max_clients=3)
    first = link.send()
    assert link.verdict(first) == "accepted"
    for _ in range(10):
        stranger = Prover(lambda: OTHER, CONTEXT)
        link.greet(stranger)
        assert link.verdict(link.send(stranger)) == "wrong_key"
    assert len(link.server) == 1
    assert link.verdict(link.send()) == "accepted"
    assert link.verdict(first) == "count_used"


def a_key_is_replaced_while_both_go_on() -> None:
    link = Link()
    assert link.verdict(link.send()) == "accepted"
    link.accepted = (KEY, OTHER)
    assert link.verdict(link.send()) == "accepted"
    link.key = OTHER
    assert link.verdict(link.send()) == "accepted"
    late = Link(accepted=(KEY, OTHER), key=OTHER)
    proved = late.client.prove("GET", "/")
    taken = late.server.check("GET", "/", proved.authorization, None)
    assert isinstance(taken, Accepted)
    assert proved.is_answered_by(200, None, taken.answer_proof(200))  # under the key that the client used
    link.accepted, link.key = (OTHER,), KEY
    assert link.verdict(link.send()) == "wrong_key"


def only_the_answer_that_was_proved_is_accepted() -> None:
    link = Link()
    first, second = (link.client.prove("GET", "/") for _ in range(2))
    taken = [link.server.check("GET", "/", one.authorization, None) for one in (first, second)]
    one, two = (accepted for accepted in taken if isinstance(accepted, Accepted))
    digest = "sha-256=:AAAA:"
    proof = one.answer_proof(200, digest)
    assert first.is_answered_by(200, digest, proof)
    assert not first.is_answered_by(201, digest, proof)
    assert not first.is_answered_by(200, None, proof)
    assert not first.is_answered_by(200, "sha-256=:BBBB:", proof)
    assert not first.is_answered_by(200, digest, None)
    assert not first.is_answered_by(200, digest, "")
    assert not first.is_answered_by(200, digest, two.answer_proof(200, digest))  # the answer to another request
    assert not first.is_answered_by(200, digest, first.authorization[-65:-1])  # reflected
    assert not second.is_answered_by(200, digest, proof)


def a_stranger_proves_no_answer() -> None:
    link = Link()
    proved = link.client.prove("GET", "/")
    stranger = Verifier(lambda: (OTHER,), CONTEXT, draw=drawn())
    assert isinstance(stranger.check("GET", "/", proved.authorization, None), Refused)
    assert not Prover(lambda: KEY, CONTEXT).prove("GET", "/").is_answered_by(200, None, "0" * 64)


HOLDS = (
    only_what_was_proved_is_accepted,
    a_proof_is_bound_to_the_server,
    a_proof_is_accepted_once,
    a_proof_with_another_count_or_client_is_refused,
    a_proof_for_an_earlier_nonce_is_refused,
    requests_overtake_each_other_within_the_window_alone,
    the_table_is_bounded_and_a_full_one_ends_every_proof,
    strangers_take_no_place,
    a_key_is_replaced_while_both_go_on,
    only_the_answer_that_was_proved_is_accepted,
    a_stranger_proves_no_answer,
)


@pytest.mark.parametrize("holds", HOLDS, ids=lambda check: check.__name__)
def test_it_holds(holds: Callable[[], None]) -> None:
    holds()


# Any text from the network

TEXTS = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=40)


@given(TEXTS, TEXTS, TEXTS | st.none(), st.sampled_from(["GET", "PUT", "DELETE"]))
def test_any_request_is_accepted_when_proved_and_refused_when_changed(
    target: str, other: str, digest: str | None, method: str
) -> None:
    link = Link()
    sent = link.send(sent=Sent(method, target, digest))
    if other != target:
        assert link.verdict(replace(sent, target=other)) == "wrong_key"
    if other != (digest or ""):
        assert link.verdict(replace(sent, digest=other)) == "wrong_key"
    assert link.verdict(sent) == "accepted"


@given(st.data())
def test_a_changed_proof_is_no_proof(data: st.DataObject) -> None:
    link = Link()
    sent = link.send()
    text = sent.authorization or ""
    at = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.characters(max_codepoint=255).filter(lambda one: one != text[at]))
    assert link.verdict(replace(sent, authorization=text[:at] + character + text[at + 1 :])) != "accepted"
    assert link.verdict(sent) == "accepted"


@given(st.text(max_size=300) | st.none())
def test_any_text_instead_of_a_proof_or_a_challenge_is_refused(text: str | None) -> None:
    link = Link()
    assert link.verdict(Sent(authorization=text)) == "proof_required"
    assert link.client.on_challenge(text) is None
    assert not link.client.prove("GET", "/").is_answered_by(200, None, text)
    assert link.verdict(link.send()) == "accepted"


@given(st.lists(st.integers(1, 3 * WINDOW), max_size=200))
def test_the_window_agrees_with_a_set_of_all_counts(counts: list[int]) -> None:
    taken, window = set[int](), requests._Counts()
    for count in counts:
        highest = max(taken, default=0)
        expected = count not in taken and highest - count < WINDOW
        assert window.take(count) is expected
        if expected:
            taken.add(count)


def test_no_key_and_no_context_is_ever_shown() -> None:
    link = Link()
    sent = link.client.prove("GET", "/")
    taken = link.server.check("GET", "/", sent.authorization, None)
    for shown in (repr(sent), repr(taken), repr(link.server), repr(link.client)):
        assert KEY.written() not in shown
        assert repr(CONTEXT) not in shown


def test_the_header_is_short_and_plain() -> None:
    text = Link().client.prove("GET", "/").authorization
    assert text.isascii()
    assert len(text) < 256
