"""Values from callers: a wrong one fails at the call, and an unusual one that means something works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embferry import EmbeddingSender, ReceiveManager, SendManager, wait
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.testing.pair import eventually
from embferry.transports.in_memory.transport import InMemoryTransport

from ..conftest import LAYOUT, SECONDS, Pair, embedding, same

SURROGATE = "\ud800"
NO_INTEGERS = (1.0, np.float64(1), "1", None, True, [1])


@pytest.fixture
def pair() -> Iterator[Pair]:
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()])
    pair = Pair(receiving, SendManager(LAYOUT, [InMemoryTransport()]), InMemoryTransport)
    yield pair
    for manager in (pair.sending, pair.receiving):
        assert manager.fault is None
        manager.close()


def announced(pair: Pair) -> EmbeddingSender:
    sender = pair.sending.open(7)
    sender.init(40, b"digest")
    return sender


Call = Callable[[Pair, Any], object]

CALLS: dict[str, tuple[Call, tuple[Any, ...]]] = {
    "the sender's room": (lambda pair, it: pair.sending.open(it), (2**64, 2**63, -1, *NO_INTEGERS)),
    "the receiver's room": (
        lambda pair, it: pair.receiving.open(it, pair.sending.endpoint),
        (2**64, 2**63, -1, *NO_INTEGERS),
    ),
    "max_tokens": (
        lambda pair, it: pair.receiving.open(7, pair.sending.endpoint, max_tokens=it),
        (-1, 2**63, 1.5, "1", True),
    ),
    "failover_timeout": (
        lambda pair, it: pair.receiving.open(7, pair.sending.endpoint, failover_timeout=it),
        (-1.0, float("nan"), "1", True),
    ),
    "total_tokens": (lambda pair, it: pair.sending.open(7).init(it, b"digest"), (-1, 2**40, 2**64, *NO_INTEGERS)),
    "content_digest": (
        lambda pair, it: pair.sending.open(7).init(1, it),
        ("digest", SURROGATE, b"", b"x" * 65, None, 7, bytearray(b"digest")),
    ),
    "aux": (
        lambda pair, it: pair.sending.open(7).init(1, b"digest", it),
        ((2**31,), (-(2**31) - 1,), (0.5,), ("1",), (None,), (0,) * 17, 7, "12", None),
    ),
    "ready_tokens": (
        lambda pair, it: announced(pair).send_embedding(embedding(40), it),
        (-1, 41, 2**64, 1.0, "1", True),
    ),
    "the fields": (
        lambda pair, it: announced(pair).send_embedding(it),
        (
            {},
            None,
            embedding(39),
            {name: rows.astype(np.int32) for name, rows in embedding(40).items()},
            {name: rows[:, ::-1] for name, rows in embedding(40).items()},
            {name: rows.tolist() for name, rows in embedding(40).items()},
        ),
    ),
    "the sender's error": (lambda pair, it: pair.sending.open(7).abort(it), ("no", RuntimeError("no"), 7)),
    "the receiver's error": (lambda pair, it: pair.receiver(7).abort(it), ("no", RuntimeError("no"), 7)),
    "sent_tokens": (
        lambda pair, it: begun(pair).resume_transfer(sent_tokens=it),
        (-1, 2**64, 1.5, "1", None, True),
    ),
}

WRONG = [
    pytest.param(call, value, id=f"{name}: {ascii(value)[:30]}")
    for name, (call, values) in CALLS.items()
    for value in values
]


def begun(pair: Pair) -> Any:
    receiver = pair.receiver(7)
    receiver.init()
    return receiver


def still_serves(pair: Pair) -> bool:
    rows = embedding(40)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    return same(receiver.arrays(), rows)


@pytest.mark.parametrize(("call", "value"), WRONG)
def test_a_wrong_value_fails_at_the_call_and_harms_nobody(pair: Pair, call: Call, value: Any) -> None:
    with pytest.raises(EmbeddingTransferError):
        call(pair, value)
    assert still_serves(pair)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint32, np.int16], ids=lambda kind: kind.__name__)
def test_every_kind_of_integer_works(pair: Pair, kind: type[Any]) -> None:
    rows = embedding(40)
    receiver = pair.receiving.open(kind(7), pair.sending.endpoint, max_tokens=kind(40))
    receiver.init()
    sender = pair.sending.open(kind(7))
    sender.init(kind(40), b"digest", (kind(1), kind(2)))
    sender.send_embedding(rows, kind(40))
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    assert receiver.machine.aux == (1, 2)


@pytest.mark.parametrize("room", [0, 2**63 - 1])
def test_the_smallest_and_the_largest_room_work(pair: Pair, room: int) -> None:
    rows = embedding(40)
    receiver = pair.receiving.open(room, pair.sending.endpoint)
    receiver.init()
    pair.sender(room, rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)


@pytest.mark.parametrize(
    "text", [f"why {SURROGATE}", "\0", "x" * 100_000, "ü" * 2000, ""], ids=lambda text: ascii(text)[:20]
)
@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_any_reason_of_an_abort_reaches_the_peer(pair: Pair, end: str, text: str) -> None:
    receiver = pair.receiver(7)
    receiver.init()
    sender = pair.sender(7, embedding(40), ready=0)
    eventually(lambda: receiver.total_embedding_length == 40)
    aborted, peer = (sender, receiver) if end == "sender" else (receiver, sender)
    aborted.abort(Aborted(text))
    with pytest.raises(Aborted):
        wait(peer, SECONDS)  # type: ignore[arg-type]
    assert still_serves(pair)


def test_a_name_of_a_worker_with_a_lone_surrogate_works_or_is_refused() -> None:
    sending = SendManager(LAYOUT, [InMemoryTransport()])
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()], name=f"worker {SURROGATE}")
    assert still_serves(Pair(receiving, sending, InMemoryTransport))
    sending.close()
    receiving.close()


@pytest.mark.parametrize("length", [2**31, 2**33, 2**40 - 1])
def test_a_length_beyond_31_bits_fails_with_a_clear_error_or_is_awaited(pair: Pair, length: int) -> None:
    receiver = pair.receiver(7)
    receiver.init()
    sender = pair.sending.open(7)
    sender.init(length, b"digest")
    with pytest.raises(EmbeddingTransferError, match="max_embedding_bytes"):
        wait(receiver, SECONDS)
    assert receiver.poll() is KVPoll.Failed
    assert still_serves(pair)


def test_a_length_beyond_31_bits_that_is_allowed_starts() -> None:
    """``aux_datas`` has 31 bits for the length; the receiver's ``total_tokens`` has all of it."""
    layout = Layout((Field("fill_ids", "int32", 1),))
    receiving = ReceiveManager(
        Geometry(layout, 8, 16), [InMemoryTransport()], settings=TransferSettings(max_embedding_bytes=1 << 62)
    )
    sending = SendManager(layout, [InMemoryTransport()])
    receiver = receiving.open(7, sending.endpoint)
    receiver.init()
    sender = sending.open(7)
    sender.init(2**31 + 5, b"digest")
    eventually(lambda: receiver.total_embedding_length == 2**31 + 5)
    assert receiver.poll() is not KVPoll.Failed
    sending.close()
    receiving.close()


@pytest.mark.parametrize("host", ["", "no host", SURROGATE, "256.1.1.1", None, 7], ids=ascii)
def test_a_host_that_is_no_address_is_refused_and_the_transports_are_closed(host: Any) -> None:
    transport = InMemoryTransport()
    with pytest.raises(LocalProtocolError):
        SendManager(LAYOUT, [transport], host=host)
    assert transport._closed


@pytest.mark.parametrize("port", [-1, 65536, 1.5, "80", None, True], ids=ascii)
def test_a_port_that_is_none_is_refused(port: Any) -> None:
    with pytest.raises(LocalProtocolError):
        SendManager(LAYOUT, [InMemoryTransport()], port=port)


def test_two_transports_of_one_kind_are_refused_and_closed() -> None:
    transports = [InMemoryTransport(), InMemoryTransport()]
    with pytest.raises(LocalProtocolError, match="memory"):
        SendManager(LAYOUT, transports)
    assert all(transport._closed for transport in transports)
