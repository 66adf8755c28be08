"""One connection of the side channel of the leased transports."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from embferry.testing.pair import DEADLINE_S
from embferry.transports.leased import messages as m
from embferry.transports.leased.channel import Channel
from embferry.transports.net.loop import LoopThread

MESSAGE = m.Welcome(bytes(1 << 20), 0)  # more than a socket's buffers hold


class End:
    """A channel on a loop of its own, and what its callbacks were given."""

    def __init__(self, *, max_unsent: int) -> None:
        self.loop = LoopThread("embferry-test", lambda error: None)
        self.ended: queue.Queue[str] = queue.Queue()
        self.faults: queue.Queue[m.FrameError] = queue.Queue()
        sock, self.peer = socket.socketpair()
        self.peer.settimeout(DEADLINE_S)
        made: queue.Queue[Channel] = queue.Queue()
        self.loop.call(lambda: made.put(self._make(sock, max_unsent)))
        self.channel = made.get(timeout=DEADLINE_S)

    def _make(self, sock: socket.socket, max_unsent: int) -> Channel:
        return Channel(
            sock,
            self.loop,
            on_message=lambda message: None,
            on_fault=self.faults.put,
            on_end=self.ended.put,
            limit=m.MAX_FRAME,
            max_unsent=max_unsent,
        )

    def close(self) -> None:
        self.loop.call(self.channel.close)
        self.loop.close()
        self.peer.close()


@pytest.fixture
def end() -> Iterator[End]:
    end = End(max_unsent=1 << 30)
    yield end
    end.close()


def returns(call: Callable[[], None]) -> bool:
    """Makes a call on a thread of its own, because it may never return."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    return not thread.is_alive()


@pytest.mark.parametrize("peer", ["does not read", "has left"])
def test_sending_and_hanging_up_return_after_the_loop_has_closed(end: End, peer: str) -> None:
    end.loop.close()
    if peer == "has left":
        end.peer.close()
    assert returns(lambda: end.channel.send(MESSAGE))
    assert returns(lambda: end.channel.send(MESSAGE))
    assert returns(end.channel.hang_up)
    assert returns(end.channel.close)


def test_a_message_that_the_kernel_does_not_take_at_once_arrives_whole(end: End) -> None:
    end.channel.send(MESSAGE)
    data, size = b"", m.HEADER.size + len(m.encode(MESSAGE))
    while len(data) < size:
        data += end.peer.recv(size - len(data))
    assert m.decode(data[m.HEADER.size :]) == MESSAGE


def test_a_peer_that_does_not_read_is_given_up() -> None:
    end = End(max_unsent=1 << 20)
    for _ in range(4):
        end.channel.send(MESSAGE)
    assert end.ended.get(timeout=DEADLINE_S) == "the peer does not read"
    end.close()


def test_a_peer_that_hangs_up_ends_the_channel_once(end: End) -> None:
    end.peer.close()
    assert end.ended.get(timeout=DEADLINE_S)
    end.channel.send(MESSAGE)
    end.loop.call(lambda: end.ended.put("later"))
    assert end.ended.get(timeout=DEADLINE_S) == "later"


def test_a_flipped_bit_is_noticed_wherever_it_is() -> None:
    frame = m.framed(m.encode(m.Welcome(b"here", 1 << 40)), 0)
    for at in range(8 * len(frame)):
        another = End(max_unsent=1 << 20)
        damaged = bytearray(frame)
        damaged[at // 8] ^= 1 << at % 8
        with another.peer:
            another.peer.sendall(damaged + bytes(m.MAX_FRAME))  # a damaged length takes in what follows
            assert another.faults.get(timeout=DEADLINE_S)
        another.close()


@pytest.mark.parametrize("numbers", [[1], [0, 2], [0, 0], [0, 2, 1]], ids=["first lost", "lost", "repeated", "moved"])
def test_a_message_that_is_not_the_next_one_is_noticed(end: End, numbers: list[int]) -> None:
    for number in numbers:
        end.peer.sendall(m.framed(m.encode(m.Ask(number, 1, bytes(16))), number))
    assert "not the next one" in str(end.faults.get(timeout=DEADLINE_S))
