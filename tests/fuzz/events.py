"""Events of the state machines as the pieces of an input: one piece, one event, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import msgspec

from embferry.protocol.errors import RemoteProtocolError, VersionMismatch
from embferry.protocol.messages import Body, Frame, decode, encode

from .raw import Pieces
from .tree import Tree, as_msgpack

ROOM, HERE, STRANGERS = 7, 100, (200, 201, 0)
"""The room, the session of the machine under test, and the sessions that others claim to have."""


def message(chance: Random, body: list[Any]) -> list[Tree]:
    """Returns the event of a message, most of them from the same peer and to this session."""
    source = chance.choice((STRANGERS[0], STRANGERS[0], STRANGERS[0], *STRANGERS))
    return [0, source, chance.choice((HERE, HERE, HERE, HERE, 0, 99)), body]


class Draw:
    """Draws events of one machine.

    Args:
        weights: How often each kind of event is drawn, ``message`` first.
        body: Draws the body of a message.
    """

    def __init__(self, weights: dict[str, float], body: Callable[[Random], list[Any]]) -> None:
        self.names, self._weights, self._body = tuple(weights), tuple(weights.values()), body

    def event(self, chance: Random) -> list[Tree]:
        """Returns an event of any kind."""
        (name,) = chance.choices(self.names, self._weights)
        return message(chance, self._body(chance)) if name == "message" else [self.code(name), chance.randrange(64)]

    def code(self, name: str) -> int:
        """Returns the number of a kind of event."""
        return self.names.index(name)


def encoded(events: list[Tree]) -> Pieces:
    """Returns each event as MessagePack."""
    return [as_msgpack(event) for event in events]


def events(pieces: Pieces, names: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yields name and arguments of each event. ``names[0]`` is ``message``; any number names an event.

    The body of a message goes through the decoder: what that rejects never reaches a machine, and is left out.
    """
    for piece in pieces:
        try:
            code, *arguments = msgspec.msgpack.decode(piece, type=list[Any])
            name = names[code % len(names)]
            if name == "message":
                source, target, body = arguments
                frame = decode(as_msgpack([1, source, target, body]))
                yield name, [frame.source, frame.target, frame.body]
            else:
                yield name, [number % (1 << 16) for number in arguments if isinstance(number, int)]
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, RemoteProtocolError, VersionMismatch):
            continue


def check_sendable(body: Body, source: int, target: int) -> None:
    """Checks that a peer can read a message that a machine sends."""
    frame = Frame(1, source, target, body)
    assert decode(encode(frame)) == frame, f"a message that no peer can read: {body}"
