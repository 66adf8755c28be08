"""Values from callers are checked at the call, and what a machine says can always be sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol import messages as m
from embferry.protocol.arguments import as_seconds
from embferry.protocol.errors import EmbeddingTransferError, LayoutMismatch, LocalProtocolError, shown
from embferry.protocol.layout import Geometry
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings

from .builders import (
    ENCODE,
    GEOMETRY,
    LANGUAGE,
    ROOM,
    SETTINGS,
    TRANSPORTS,
    a_grant,
    an_offer,
    new_receiver,
    new_sender,
    offered,
    opened,
    sent_messages,
    to_receiver,
    to_sender,
)


class Unreadable:
    def __repr__(self) -> str:
        raise AttributeError("no such attribute")


UNREADABLE = Unreadable()
TCP = m.TransportAddress("tcp", b"")
NO_INTEGERS = (1.0, np.float32(1), True, np.bool_(True), "1", b"1", None, [1])


def receiver(**changes: Any) -> Receiver:
    given: dict[str, Any] = {
        "room": ROOM,
        "session": LANGUAGE,
        "geometry": GEOMETRY,
        "endpoint": "language",
        "transports": TRANSPORTS,
    }
    return Receiver(**{**given, **changes}, settings=SETTINGS, now=0.0)


def sender(**changes: Any) -> Sender:
    given: dict[str, Any] = {"room": ROOM, "session": ENCODE, "layout": GEOMETRY.layout, "transports": TRANSPORTS}
    return Sender(**{**given, **changes}, settings=SETTINGS, now=0.0)


INTEGERS: dict[str, Callable[[Any], object]] = {
    "room": lambda value: receiver(room=value),
    "session": lambda value: receiver(session=value),
    "max_tokens": lambda value: receiver(max_tokens=value) if value is not None else new_sender().produce(value),
    "room of a sender": lambda value: sender(room=value),
    "session of a sender": lambda value: sender(session=value),
    "total_tokens": lambda value: new_sender().announce(value, b"content"),
    "aux": lambda value: new_sender().announce(8, b"content", (value,)),
    "ready_tokens": lambda value: opened(8).produce(value),
    "epoch": lambda value: offered(8).grant((0, 1), value, 0.0),
    "blocks": lambda value: offered(8).grant((value, 2), 1, 0.0),
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", NO_INTEGERS, ids=lambda value: f"{type(value).__name__}")
def test_only_integers_are_integers(name: str, value: object) -> None:
    with pytest.raises(LocalProtocolError, match=type(value).__name__):
        INTEGERS[name](value)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [-(1 << 63), -1 - (1 << 31), 1 << 63, 1 << 64])
def test_integers_out_of_bounds_are_rejected(name: str, value: int) -> None:
    with pytest.raises(LocalProtocolError, match=name.partition(" ")[0]):
        INTEGERS[name](value)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, int])
def test_integers_of_numpy_are_integers(kind: Callable[[int], Any]) -> None:
    end = sender(room=kind(ROOM), session=kind(ENCODE))
    end.announce(kind(8), b"content", np.array([8, 3], np.int32))  # type: ignore[arg-type]
    end.produce(kind(8))
    other = receiver(room=kind(ROOM), session=kind(LANGUAGE), max_tokens=kind(8))
    to_sender(end, *sent_messages(other), target=0)
    to_receiver(other, *sent_messages(end))
    other.grant((kind(3), kind(4)), kind(1), 0.0)
    bodies = [*sent_messages(other), *sent_messages(end), an_offer(8)]
    for body in bodies:
        assert m.decode(m.encode(m.Frame(1, end.session, other.session, body))).body == body
    assert bodies


@pytest.mark.parametrize("value", ["content", bytearray(b"content"), None, b"", b"x" * 65])
def test_a_digest_is_bytes(value: Any) -> None:
    with pytest.raises(LocalProtocolError, match="content_digest"):
        new_sender().announce(8, value)


def test_aux_is_a_sequence() -> None:
    with pytest.raises(LocalProtocolError, match="aux"):
        new_sender().announce(8, b"content", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ["a reason", ValueError("a reason"), None])
def test_a_transfer_is_aborted_with_an_error_of_a_transfer(error: Any) -> None:
    for end in (offered(8), opened(8)):
        with pytest.raises(LocalProtocolError, match="error"):
            end.abort(error, 0.0)
        with pytest.raises(LocalProtocolError, match="error"):
            end.transport_lost("tcp", error, 0.0)
        assert end.error is None


@pytest.mark.parametrize("endpoint", ["", None, 5])
def test_an_endpoint_is_a_text(endpoint: Any) -> None:
    with pytest.raises(LocalProtocolError, match="endpoint"):
        receiver(endpoint=endpoint)


@pytest.mark.parametrize(
    "transports",
    [
        tuple(m.TransportAddress(f"t{at}", b"") for at in range(65)),
        (TCP, TCP),
        (m.TransportAddress("", b""),),
        (m.TransportAddress("t" * 65, b""),),
        (m.TransportAddress("t\ud800", b""),),
        (m.TransportAddress("tcp", b"x" * 1025),),
        (m.TransportAddress("tcp", "handle"),),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("make", [receiver, sender])
def test_transports_that_cannot_be_told_to_the_peer_are_rejected(make: Callable[..., object], transports: Any) -> None:
    with pytest.raises(LocalProtocolError):
        make(transports=transports)


def test_a_geometry_that_the_peer_would_not_decode_is_rejected() -> None:
    with pytest.raises(LayoutMismatch):
        receiver(geometry=Geometry(GEOMETRY.layout, 0, 4))


@pytest.mark.parametrize(
    ("name", "value"),
    [("chunk_bytes", value) for value in (1.5, True, "1", np.array([1, 2]), np.array([1.5]), [], None)]
    + [("linger", value) for value in ("1", True, b"1", np.array([1.0, 2.0]), 10**400, [], None, 1j)]
    + [(name, value) for name in ("chunk_bytes", "linger") for value in (0, -1, UNREADABLE)]
    + [("linger", math.nan), ("linger", -math.inf), ("verify", 1), ("verify", np.array([True, False]))],
)
def test_a_setting_has_the_type_of_its_default(name: str, value: Any) -> None:
    with pytest.raises(LocalProtocolError, match=name):
        TransferSettings(**{name: value})


@pytest.mark.parametrize(
    "value",
    ["1", b"1", True, None, [], 1j, math.nan, 0, -1, -math.inf, 10**400, np.array([1.0, 2.0]), UNREADABLE],
    ids=lambda value: type(value).__name__,
)
def test_a_time_is_a_positive_number(value: Any) -> None:
    with pytest.raises(LocalProtocolError, match="timeout"):
        as_seconds("timeout", value)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int8(2), Fraction(2), Decimal(2)])
def test_every_kind_of_number_is_a_time(value: Any) -> None:
    assert (as_seconds("timeout", value), type(as_seconds("timeout", value))) == (2.0, float)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_every_object_can_be_shown(error: type[BaseException]) -> None:
    class Unreadable:
        def __repr__(self) -> str:
            raise error

    assert "Unreadable" in shown(Unreadable())
    assert shown("x" * 100, 4) == "'xxx…"


def test_settings_of_numpy_are_numbers() -> None:
    settings = TransferSettings(chunk_bytes=np.int64(5), linger=np.float32(2))  # type: ignore[arg-type]
    assert (type(settings.chunk_bytes), type(settings.linger)) == (int, float)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=m.MAX_TEXT + 100)
"""Lone surrogates included."""


@given(code=ANY_TEXT, detail=ANY_TEXT)
def test_every_error_can_be_sent(code: str, detail: str) -> None:
    error = EmbeddingTransferError(detail)
    error.code = code
    bodies: list[m.Body] = []
    end = opened(8)
    to_sender(end, a_grant(1, 0, 8, (0, 2)))
    end.write_failed(LANGUAGE, 1, 0, 4, error)
    end.abort(error, 0.0)
    bodies += sent_messages(end)
    other = offered(8)
    other.abort(error, 0.0)
    bodies += sent_messages(other)
    assert sum(isinstance(body, m.Abort | m.WriteFailed) for body in bodies) == 3
    for body in bodies:
        assert m.decode(m.encode(m.Frame(1, 5, 6, body))).body == body


@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=300))
def test_every_endpoint_can_be_sent(endpoint: str) -> None:
    (body,) = sent_messages(receiver(endpoint=endpoint))
    assert m.decode(m.encode(m.Frame(1, 5, 6, body))).body == body
    assert new_receiver().endpoint == "language"
