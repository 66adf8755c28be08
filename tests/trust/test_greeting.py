"""The greeting: what honest ends say, what a stranger cannot make them believe, and that each check is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, TransportError, WrongKey
from embferry.trust import ClusterKeys, Key, Trust, greeting
from embferry.trust.greeting import HELLO, PROOF_BYTES, REFUSED, Channel, Greeting, Role

from .greeting_mutants import MUTANTS
from .greetings import (
    ATTACKS,
    CLUSTER,
    FOREIGN,
    KEYLESS,
    LetInError,
    acceptor,
    converse,
    dialer,
    fit,
    give,
)

Attack = Callable[[], None]
CASES = [(name, attack) for name, (_, attacks) in MUTANTS.items() for attack in attacks]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_no_attack_succeeds(attack: Attack) -> None:
    attack()


@pytest.mark.parametrize(("name", "attack"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_an_attack_succeeds_without_its_check(name: str, attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(LetInError):
        attack()


def test_every_attack_catches_a_mutant() -> None:
    needed = {attack for _, attacks in MUTANTS.values() for attack in attacks}
    assert set(ATTACKS) == needed


@given(st.data(), st.sampled_from(Channel), st.sampled_from([CLUSTER, KEYLESS]))
def test_honest_ends_meet_however_their_bytes_are_cut(data: st.DataObject, channel: Channel, trust: Trust) -> None:
    ends = dialer(trust, channel), acceptor(trust, channel)
    assert not converse(*ends, lambda count: data.draw(st.integers(1, count)))
    assert all(end.done and end.wanted == 0 for end in ends)


@given(
    st.sampled_from(["hello of the acceptor", "hello of the dialer", "proofs", "answer"]), st.integers(0, 8 * 32 - 1)
)
def test_a_changed_bit_is_noticed(message: str, bit: int) -> None:
    """The proofs are the same twice under a single key, so both are changed."""
    first, second = dialer(), acceptor()

    def change(name: str, data: bytes) -> bytes:
        return data if name != message else (int.from_bytes(data) ^ 1 << bit).to_bytes(len(data))

    proofs = give(first, change("hello of the acceptor", second.hello))
    proofs = change("proofs", proofs[:PROOF_BYTES]) * 2
    answer = give(second, change("hello of the dialer", first.hello), proofs)
    give(first, change("answer", answer or REFUSED))
    assert not first.done
    assert second.done == (message == "answer")


def test_an_end_wants_no_byte_beyond_the_greeting() -> None:
    for trust in (CLUSTER, KEYLESS):
        end = acceptor(trust)
        with pytest.raises(LocalProtocolError, match="41 bytes"):
            end.receive(dialer(trust).hello + b"x")
    first, second = dialer(), acceptor()
    assert (first.wanted, second.wanted) == (HELLO.size, HELLO.size)
    proofs = first.receive(second.hello)
    second.receive(first.hello)
    assert (first.wanted, second.wanted) == (PROOF_BYTES, 2 * PROOF_BYTES)
    first.receive(second.receive(proofs))
    assert (first.wanted, second.wanted) == (0, 0)


def test_garbage_is_refused_before_a_whole_hello_has_come() -> None:
    for garbage in (b"\0", b"G", b"EMBF", b"EMX"):
        with pytest.raises(TransportError, match="does not greet"):
            acceptor().receive(garbage)


def test_an_error_says_which_end_lacks_the_key() -> None:
    has, lacks = "this end has a cluster key and the peer has none", "the peer has a cluster key and this end has none"
    assert [error.detail[: len(has)] for error in converse(dialer(), acceptor(KEYLESS))] == [has, lacks[: len(has)]]
    assert [error.detail[: len(has)] for error in converse(dialer(KEYLESS), acceptor())] == [lacks[: len(has)], has]


def test_both_ends_learn_that_the_key_is_wrong() -> None:
    errors = converse(dialer(Trust(ClusterKeys(FOREIGN))), acceptor())
    assert [type(error) for error in errors] == [WrongKey, WrongKey]
    assert ["does not know this cluster's key" in error.detail for error in errors] == [True, False]
    assert not any(error.retryable for error in errors)


def test_the_bytes_of_the_greeting_do_not_change() -> None:
    key = Key(bytes(range(32)))
    hellos = [Greeting(role, Channel.TCP, (key,), bytes([role]) * 32) for role in Role]
    assert hellos[0].hello == b"EMBg\1\1\2\1" + b"\1" * 32
    assert hellos[1].hello == b"EMBg\1\1\2\2" + b"\2" * 32
    proofs = hellos[0].receive(hellos[1].hello)
    assert proofs[:32] == proofs[32:] == key.mac(b"embferry greeting", b"\1", hellos[0].hello, hellos[1].hello)
    hellos[1].receive(hellos[0].hello)
    answer = hellos[1].receive(proofs)
    assert answer == key.mac(b"embferry greeting", b"\2", hellos[0].hello, hellos[1].hello)
    assert bytes(32) == REFUSED
    assert {channel.name: channel.value for channel in Channel} == {"CONTROL": 1, "TCP": 2, "NIXL": 3, "MOONCAKE": 4}


# A stranger between many greetings


class Sessions:
    """Honest ends that all know the key, and a stranger that carries every byte between them, or does not."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw
        self.ends: list[Greeting] = []
        self.hellos, self.proofs = [], [REFUSED, b"\7" * PROOF_BYTES]  # what the stranger has seen, and makes up

    def play(self, steps: int) -> None:
        for _ in range(steps):
            waiting = [end for end in self.ends if end.wanted]
            if not waiting or self._draw(st.integers(0, 3)) == 0:
                role, channel = self._draw(st.sampled_from(Role)), self._draw(st.sampled_from(list(Channel)[:2]))
                self.ends.append(CLUSTER.greeting(role, channel))
                self.hellos.append(self.ends[-1].hello)
            else:
                self._say(self._draw(st.sampled_from(waiting)))
            self._check()

    def _say(self, end: Greeting) -> None:
        if end._their_hello is None:
            said = give(end, fit(self._draw(st.sampled_from(self.hellos)), end))
        else:
            count = end.wanted // PROOF_BYTES
            said = give(end, b"".join(self._draw(st.sampled_from(self.proofs[::-1])) for _ in range(count)))
        self.proofs += [said[at : at + PROOF_BYTES] for at in range(0, len(said), PROOF_BYTES)]

    def _check(self) -> None:
        """Each end that is done has spoken with one honest end, of the other role and its own channel."""
        partners = []
        for end in self.ends:
            if end.done:
                found = [
                    other
                    for other in self.ends
                    if (other.hello, other._their_hello) == (end._their_hello, end.hello)
                    and (other._role, other._channel) == (end._role.other, end._channel)
                ]
                if len(found) != 1:
                    raise LetInError
                partners += found
        if len(set(map(id, partners))) < len(partners):
            raise LetInError


def search(**options: Any) -> None:
    @settings(deadline=None, database=None, derandomize=True, **options)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        Sessions(data.draw).play(12)

    run()


def test_a_stranger_only_carries_bytes_between_ends_that_meet() -> None:
    search(max_examples=200)


@pytest.mark.parametrize(
    "name", ["nonces_are_not_in_the_proof", "the_role_is_not_in_the_proof", "the_channel_is_not_in_the_proof",
             "no_proof_is_checked", "every_answer_is_taken"]
)  # fmt: skip
def test_the_search_finds_a_missing_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(LetInError):
        search(max_examples=1000, phases=[Phase.generate])


def test_an_error_shows_no_secret() -> None:
    for ends in ((dialer(), acceptor(KEYLESS)), (dialer(Trust(ClusterKeys(FOREIGN))), acceptor())):
        for error in converse(*ends):
            assert isinstance(error, EmbeddingTransferError)
            assert not any(key.written() in str(error) for key in (FOREIGN, CLUSTER.keys.current()))  # type: ignore[union-attr]
    assert greeting.VERSION == 1
