"""Rooms of a sender in the states that tests begin with, and the commands that are expected of them."""

from __future__ import annotations

import pytest

from embferry.disaggregation.wire.sender_rooms import Registered, Report, SenderRooms, WriteBlocks
from embferry.protocol.errors import RemoteProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from tests.disaggregation.wire.messages import POINTERS, ROOM, SESSION, WIRE, init, register

OTHER_POINTERS = tuple(pointer + 4096 for pointer in POINTERS)
SETTINGS = TransferSettings(bootstrap_timeout=30, waiting_timeout=120, transfer_timeout=10)


def report(status: KVPoll) -> Report:
    return Report(ROOM, "10.0.0.2", 41007, status)


def write(blocks: tuple[int, ...], sent: int, tokens: int, aux: bool, session: str = SESSION) -> WriteBlocks:
    return WriteBlocks(ROOM, session, POINTERS, blocks, sent, tokens, aux)


def registered(*sessions: str) -> SenderRooms:
    rooms = SenderRooms(WIRE, SETTINGS)
    for session in sessions or (SESSION,):
        assert rooms.receive(register(session), 0) == [Registered(session, POINTERS)]
    return rooms


def begun(total_tokens: int = 1000) -> SenderRooms:
    """Returns rooms of which one has its initial transfer written, and not the rest."""
    rooms = registered()
    rooms.open(ROOM, 0)
    rooms.receive(init(), 0)
    rooms.ready(ROOM, total_tokens, 0)
    rooms.written(ROOM, SESSION, 0)
    return rooms


def refusal(rooms: SenderRooms, message: list[bytes], now: float = 0) -> str:
    """Returns the reason for which a message is refused."""
    with pytest.raises(RemoteProtocolError) as refused:
        rooms.receive(message, now)
    return refused.value.detail.partition(" (session ")[0]
