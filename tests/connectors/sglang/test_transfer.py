"""One part between the plug-in's two sides: announced early, resumed, and never mixed of two different encodes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from embferry import IntegrityError, KVPoll, as_fields
from embferry.connectors.sglang.incoming import IncomingPart
from embferry.connectors.sglang.outgoing import MAX_RANKS, MAX_UNUSED
from embferry.connectors.sglang.parts import Content, Destination, PartId
from embferry.connectors.shared.shape import digest_of

from .both_sides import SHAPE, TOKENS, WAIT_S, both_sides, rows_of, wait_complete

pytestmark = pytest.mark.integration

MIDDLE = 96
"""Tokens: whole blocks."""


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def arrived(incoming: IncomingPart, seed: int) -> bool:
    assert incoming.shared is not None
    return np.array_equal(incoming.shared.rows, rows_of(seed))


def receiver_of(incoming: IncomingPart):  # type: ignore[no-untyped-def]
    assert incoming._receiver is not None
    return incoming._receiver


def test_an_embedding_longer_than_the_pool_arrives() -> None:
    with both_sides() as (incoming, (encoder,), language):
        incoming.comes_from(encoder.source())
        incoming.made(encoder.encode(1))
        wait_complete(incoming)
        assert arrived(incoming, 1)
        encoder.sending.result(WAIT_S)
        counts = language.counters.read()
        assert counts["transfers", "success"] == 1
        assert counts["tokens", ""] == TOKENS
        assert counts["resumed_transfers", ""] > 1


def test_the_length_is_known_before_the_embedding_is_made() -> None:
    with both_sides() as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        encoder.part().announce(SHAPE)
        until(lambda: receiver_of(incoming).total_embedding_length == TOKENS)
        assert receiver_of(incoming).poll() is KVPoll.WaitingForInput


def test_the_message_may_come_after_the_embedding() -> None:
    with both_sides() as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        content = encoder.encode(1)
        encoder.sending.result(WAIT_S)
        assert not incoming.poll()
        incoming.made(content)
        wait_complete(incoming)  # the digest is taken on a thread of the library
        assert arrived(incoming, 1)


def stop_in_the_middle(incoming: IncomingPart, encoder, after: Callable[[], object] = int) -> None:  # type: ignore[no-untyped-def]
    """The encoder sends a part of the embedding and is gone. ``after``: runs after each callback of the part."""
    part = encoder.part()
    incoming.comes_from(encoder.source())
    receiver_of(incoming).on_change(after)
    part.announce(SHAPE)
    part.encoded(SHAPE, rows_of(1), digest_of(rows_of(1), SHAPE).hex())
    incoming.made(part.content)
    part._senders[0].send_embedding(as_fields({"input_embeddings": part.rows}), ready_tokens=MIDDLE)
    until(lambda: receiver_of(incoming).transferred_tokens == MIDDLE)
    encoder.side.close()
    until(lambda: receiver_of(incoming).lost is not None)


def test_a_transfer_resumes_with_another_encoder_where_it_stopped() -> None:
    with both_sides(2) as (incoming, (first, second), language):
        stop_in_the_middle(incoming, first)
        incoming.comes_from(second.source(attempt=1))
        incoming.made(second.encode(1, attempt=1, before=incoming.before))
        wait_complete(incoming)
        assert arrived(incoming, 1)
        counts = language.counters.read()
        assert counts["repeated_bytes", ""] == 0
        assert counts["failovers", "found"] == 1


def test_a_transfer_starts_again_if_the_other_encoder_made_other_bytes() -> None:
    with both_sides(2) as (incoming, (first, second), language):
        stop_in_the_middle(incoming, first)
        incoming.comes_from(second.source(attempt=1))
        incoming.made(second.encode(2, attempt=1, before=incoming.before))
        wait_complete(incoming)
        assert arrived(incoming, 2)
        assert language.counters.read()["repeated_bytes", ""] > 0


def test_an_encoder_that_was_given_up_is_not_listened_to() -> None:
    with both_sides(2) as (incoming, (first, second), _):
        incoming.comes_from(first.source())
        incoming.comes_from(second.source(attempt=2))
        incoming.comes_from(first.source(attempt=1))
        assert incoming.part == PartId("rid", second.source().name, 0, 2)
        incoming.made(second.encode(3, attempt=2))
        wait_complete(incoming)
        assert arrived(incoming, 3)


def test_an_embedding_that_no_encoder_has_made_is_refused() -> None:
    with both_sides() as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        content = encoder.encode(1)
        incoming.made(type(content)(content.content, "0" * 32))
        with pytest.raises(IntegrityError, match="not the one that was encoded"):
            wait_complete(incoming)


def test_an_abort_reaches_the_encoder() -> None:
    with both_sides() as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        encoder.part().announce(SHAPE)
        until(lambda: receiver_of(incoming).total_embedding_length == TOKENS)
        sender = encoder.part()._senders[0]
        incoming.close()
        until(lambda: sender.poll() is KVPoll.Failed)
        encoder.encode(1)
        assert encoder.sending.result(WAIT_S) is None, "it is not wanted, which is no error of the encoder"
        assert encoder.side.counters.read()["offers_ended", "unfetched"] == 1


def test_a_part_that_is_dropped_is_lost_at_the_language_server() -> None:
    with both_sides() as (incoming, (encoder,), _):
        incoming.comes_from(encoder.source())
        encoder.part().announce(SHAPE)
        until(lambda: receiver_of(incoming).total_embedding_length == TOKENS)
        encoder.side.parts.drop(encoder.part().part.text)
        until(lambda: receiver_of(incoming).lost is not None)
        assert not incoming.poll()


def test_an_encoder_that_is_asked_again_may_drop_the_earlier_attempt_late() -> None:
    with both_sides() as (incoming, (encoder,), language):
        incoming.comes_from(encoder.source())
        encoder.part().announce(SHAPE)
        until(lambda: receiver_of(incoming).total_embedding_length == TOKENS)
        incoming.comes_from(encoder.source(attempt=1))
        encoder.side.parts.drop(encoder.part().part.text)
        until(lambda: language.counters.read().get(("losses", "aborted"), 0) == 1)
        incoming.ask_again()
        incoming.made(encoder.encode(1, attempt=1))
        wait_complete(incoming)
        assert arrived(incoming, 1)


def test_parts_that_are_asked_for_and_never_encoded_are_bounded() -> None:
    with both_sides() as (_, (encoder,), _):
        for number in range(MAX_UNUSED + 50):
            encoder.side.parts.get(PartId(str(number), "0" * 32, 0))
        assert len(encoder.side.parts) == MAX_UNUSED


def test_a_part_that_is_complete_needs_no_other_encoder() -> None:
    """Its encoder is lost before it has told the dispatcher that it is done."""
    with both_sides(2) as (incoming, (first, second), _):
        incoming.comes_from(first.source())
        incoming.made(first.encode(1))
        wait_complete(incoming)
        assert not incoming.comes_from(second.source(attempt=1))
        assert incoming.poll()
        assert arrived(incoming, 1)


def test_an_embedding_whose_message_was_lost_is_fetched_again() -> None:
    with both_sides(2) as (incoming, (first, second), _):
        incoming.comes_from(first.source())
        first.encode(1)
        first.sending.result(WAIT_S)
        until(lambda: receiver_of(incoming).poll() is KVPoll.Success)
        stale, memory = receiver_of(incoming), incoming.shared
        digest = digest_of(rows_of(1), SHAPE).hex()
        assert incoming.comes_from(second.source(attempt=1))
        incoming._verified = (stale, digest)  # as the callback thread does that was still taking the digest
        incoming.made(Content("0" * 32, digest))
        assert not incoming.poll(), "the digest of the transfer before"
        assert memory is not None
        assert not memory.is_open
        incoming.made(second.encode(2, attempt=1))
        wait_complete(incoming)
        assert arrived(incoming, 2)


def test_ranks_that_ask_for_one_part_are_bounded() -> None:
    with both_sides() as (_, (encoder,), _):
        part = encoder.part()
        for number in range(MAX_RANKS + 50):
            part.add(Destination(part.part.text, f"h:{number}", 1, 0, True))
        assert len(part._destinations) == MAX_RANKS
