"""The errors of a receiver whose peer is late. Each names what it waited for, and for how long."""

from __future__ import annotations

from collections.abc import Callable

from .errors import EmbeddingTransferError, LeaseExpired, PeerGone
from .settings import TransferSettings

Deadline = tuple[float, Callable[[], EmbeddingTransferError]]
"""A time, and the error with which the transfer ends if nothing has happened by then."""


def without_peer(
    settings: TransferSettings,
    room: int,
    heard_at: float,
    asked_at: float,
    resumes_at: int | None,
    offer_timeout: float,
) -> list[Deadline]:
    """Returns the deadlines of a receiver that has opened the room and has no offer.

    Args:
        settings: The time-outs.
        room: The ``bootstrap_room``.
        heard_at: When the worker gave the last sign of life, or was asked for one.
        asked_at: When the room was opened.
        resumes_at: The token at which the last sender was lost; None: this is the first.
        offer_timeout: Seconds for which a worker that answers may take to make its offer.
    """
    first = resumes_at is None
    silence = settings.answer_timeout if first else settings.peer_timeout

    def silent() -> PeerGone:
        if first:
            why = f"has not answered for {silence:g} s; is it stuck, or do its messages not get through?"
        else:
            why = f"was lost at token {resumes_at} and no other has taken over for {silence:g} s"
        return PeerGone(f"the encode worker {why}", room=room)

    def no_room() -> PeerGone:
        why = f"the encode worker has not opened the room for {offer_timeout:g} s; was it asked to encode?"
        return PeerGone(why, room=room)

    return [(heard_at + silence, silent), (asked_at + offer_timeout, no_room)]


def with_peer(
    settings: TransferSettings, room: int, heard_at: float, progress_at: float, tokens: int | None
) -> list[Deadline]:
    """Returns the deadlines of a receiver that waits for tokens, or for the length.

    Args:
        settings: The time-outs.
        room: The ``bootstrap_room``.
        heard_at: When the peer was last heard of, or asked.
        progress_at: When the last token was verified.
        tokens: The transferred tokens; None: no token has arrived, and the encoder may still run.
    """
    first = tokens is None
    limit = settings.waiting_timeout if first else settings.transfer_timeout

    def late() -> LeaseExpired:
        if first:
            return LeaseExpired(f"the encode worker has produced nothing for {limit:g} s", room=room)
        return LeaseExpired(f"no token has arrived for {limit:g} s after the first {tokens}", room=room)

    def silent() -> PeerGone:
        silence = f"{settings.peer_timeout:g} s at token {tokens or 0}"
        return PeerGone(f"the encode worker has been silent for {silence}", room=room)

    return [(progress_at + limit, late), (heard_at + settings.peer_timeout, silent)]
