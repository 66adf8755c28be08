"""Greetings between honest ends, and the attacks of a stranger on them.

A stranger knows no key. It sees and changes every byte, may connect to each port, and may have parts connect to it. An
attack raises :class:`LetInError` if it succeeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from embferry.protocol.errors import EmbeddingTransferError
from embferry.trust import ClusterKeys, Key, Trust, greeting
from embferry.trust.greeting import HELLO, PROOF_BYTES, REFUSED, Channel, Greeting, Role

KEY, OLD, OLDEST, FOREIGN = (Key(bytes([number]) * 32) for number in (1, 2, 3, 4))
CLUSTER = Trust(ClusterKeys(KEY))
KEYLESS = Trust()


class LetInError(AssertionError):
    """A stranger was taken for a part of the cluster, or an honest end was not."""


def dialer(trust: Trust = CLUSTER, channel: Channel = Channel.TCP) -> Greeting:
    return trust.greeting(Role.DIALER, channel)


def acceptor(trust: Trust = CLUSTER, channel: Channel = Channel.TCP) -> Greeting:
    return trust.greeting(Role.ACCEPTOR, channel)


def converse(
    first: Greeting, second: Greeting, cuts: Callable[[int], int] = lambda count: count
) -> list[EmbeddingTransferError]:
    """Carries bytes between two ends until neither has any for the other. Returns their errors.

    Args:
        first: One end.
        second: The other.
        cuts: How many bytes of those at hand, 1 at least, an end is given next.
    """
    ends, errors = (first, second), []
    waiting = {first: bytearray(second.hello), second: bytearray(first.hello)}
    while any(waiting[end] and end.wanted for end in ends):
        for end, other in (ends, ends[::-1]):
            if waiting[end] and end.wanted:
                count = cuts(min(len(waiting[end]), end.wanted))
                piece = bytes(waiting[end][:count])
                del waiting[end][:count]
                try:
                    waiting[other] += end.receive(piece)
                except EmbeddingTransferError as error:
                    errors.append(error)
                    waiting[other] += end.farewell
                    waiting[end].clear()
    return errors


def fit(hello: bytes, end: Greeting) -> bytes:
    """Returns ``hello`` with the role and the channel that ``end`` waits for."""
    return hello[:6] + bytes([end._channel, end._role.other]) + hello[8:]


def give(end: Greeting, *messages: bytes) -> bytes:
    """Gives an end what a stranger sends it. Returns what it says, also before it hangs up."""
    said = b""
    with contextlib.suppress(EmbeddingTransferError):
        for message in messages:
            said += end.receive(message)
    return said


def keep_out(*ends: Greeting) -> None:
    if any(end.done for end in ends):
        raise LetInError


# Attacks


def proofs_without_a_key() -> None:
    end = acceptor()
    give(end, fit(acceptor().hello, end), b"\x07" * 64)
    keep_out(end)


def proofs_under_a_foreign_key() -> None:
    ends = dialer(Trust(ClusterKeys(FOREIGN))), acceptor()
    converse(*ends)
    keep_out(*ends)


def an_answer_without_a_key() -> None:
    for answer in (b"\x07" * 32, REFUSED):
        end = dialer()
        give(end, fit(end.hello, end), answer)
        keep_out(end)


def a_recording_of_a_dialer() -> None:
    recorded, end = dialer(), acceptor()
    proofs = recorded.receive(end.hello)
    give(end, recorded.hello, proofs)
    again = acceptor()
    give(again, recorded.hello, proofs)
    keep_out(again)


def a_recording_of_an_acceptor() -> None:
    first, recorded = dialer(), acceptor()
    proofs = first.receive(recorded.hello)
    recorded.receive(first.hello)
    answer = recorded.receive(proofs)
    again = dialer()
    give(again, recorded.hello, answer)
    keep_out(again)


def the_own_proof_returned() -> None:
    end = dialer()
    proofs = give(end, fit(end.hello, end))
    give(end, proofs[:PROOF_BYTES])
    keep_out(end)


def all_bytes_returned() -> None:
    for trust in (CLUSTER, KEYLESS):
        for end in (dialer(trust), acceptor(trust)):
            said = give(end, end.hello)
            give(end, said[: end.wanted])
            keep_out(end)


def a_proof_moved_to_another_port() -> None:
    """The stranger joins a dialer of one channel with an acceptor of another, and corrects what each must see."""
    for channel in set(Channel) - {Channel.TCP}:
        first, second = dialer(), acceptor(channel=channel)
        proofs = give(first, fit(second.hello, first))
        answer = give(second, fit(first.hello, second), proofs)
        give(first, answer)
        keep_out(first, second)


def another_channel_without_keys() -> None:
    ends = dialer(KEYLESS), acceptor(KEYLESS, Channel.CONTROL)
    converse(*ends)
    keep_out(*ends)


def another_role_without_keys() -> None:
    for ends in ((dialer(KEYLESS), dialer(KEYLESS)), (acceptor(KEYLESS), acceptor(KEYLESS))):
        converse(*ends)
        keep_out(*ends)


def an_end_without_a_key() -> None:
    for ends in ((dialer(), acceptor(KEYLESS)), (dialer(KEYLESS), acceptor())):
        converse(*ends)
        keep_out(*ends)


def the_keys_taken_out_of_the_hellos() -> None:
    first, second = dialer(), acceptor()
    said = give(first, second.hello[:5] + b"\0" + second.hello[6:])
    give(second, first.hello[:5] + b"\0" + first.hello[6:], said)
    keep_out(first, second)


def unknown_flags() -> None:
    end = dialer(KEYLESS)
    give(end, (hello := fit(end.hello, end))[:5] + b"\x02" + hello[6:])
    keep_out(end)


def another_version() -> None:
    end = acceptor(KEYLESS)
    give(end, (hello := fit(end.hello, end))[:4] + b"\x02" + hello[5:])
    keep_out(end)


def another_protocol() -> None:
    end = acceptor(KEYLESS)
    give(end, b"GET " + fit(end.hello, end)[4:])
    keep_out(end)


def an_acceptor_that_speaks_first() -> None:
    """Before the dialer has proven anything, an acceptor may not say more than its hello."""
    end = acceptor()
    if give(end, fit(end.hello, end)):
        raise LetInError


def changed_hellos() -> None:
    """Each bit of both hellos, and the role, is under the proof."""
    hellos = dialer().hello, acceptor().hello
    seen = {greeting.proof(KEY, role, *hellos) for role in Role}
    for which, hello in enumerate(hellos):
        for bit in range(8 * HELLO.size):
            changed = bytearray(hello)
            changed[bit // 8] ^= 1 << bit % 8
            seen.add(
                greeting.proof(KEY, Role.DIALER, *(bytes(changed) if n == which else h for n, h in enumerate(hellos)))
            )
    if len(seen) != 2 + 2 * 8 * HELLO.size:
        raise LetInError


def a_key_that_was_replaced() -> None:
    """Honest ends go on while one key replaces another, as long as they have one in common; no longer."""
    sets: list[tuple[Key, ...]] = [(OLDEST,), (OLD, OLDEST), (OLD,), (KEY, OLD), (KEY,)]
    for mine in sets:
        for theirs in sets:
            ends = dialer(Trust(ClusterKeys(*mine))), acceptor(Trust(ClusterKeys(*theirs)))
            converse(*ends)
            if any(end.done != bool(set(mine) & set(theirs)) for end in ends):
                raise LetInError


ATTACKS: tuple[Callable[[], None], ...] = (
    proofs_without_a_key, proofs_under_a_foreign_key, an_answer_without_a_key, a_recording_of_a_dialer,
    a_recording_of_an_acceptor, the_own_proof_returned, all_bytes_returned, a_proof_moved_to_another_port,
    another_channel_without_keys, another_role_without_keys, an_end_without_a_key, the_keys_taken_out_of_the_hellos,
    unknown_flags, another_version, another_protocol, an_acceptor_that_speaks_first, changed_hellos,
    a_key_that_was_replaced,
)  # fmt: skip
