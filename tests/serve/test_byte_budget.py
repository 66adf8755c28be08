"""The bound on the bytes that requests hold together, and what counts against it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import pytest

from embferry.serve.byte_budget import ByteBudget
from embferry.serve.errors import ServeError
from embferry.serve.http.body import Pace, read_body
from embferry.serve.off_loop import PIECE_BYTES, decode_base64


def test_what_goes_beyond_the_limit_is_refused_until_something_is_released() -> None:
    budget = ByteBudget(100, "section.setting")
    first, second = budget.hold(60), budget.hold(40)
    with pytest.raises(ServeError) as caught:
        budget.hold(1)
    error = caught.value
    assert (error.code, error.http_status, error.retryable) == ("capacity_exhausted", 503, True)
    assert "section.setting" in error.detail
    second.release()
    second.release()
    assert budget.held == 60
    first.add(40)
    assert budget.held == 100


def test_a_request_larger_than_the_limit_is_admitted_alone() -> None:
    budget = ByteBudget(100, "s")
    with budget.hold(1000), pytest.raises(ServeError):
        budget.hold(1)
    assert budget.held == 0
    with budget.hold(10) as other:
        with pytest.raises(ServeError):
            budget.hold(1000)
        other.set(0)
        budget.hold(1000).release()


def test_a_share_that_cannot_grow_stays_as_it_is() -> None:
    budget = ByteBudget(100, "s")
    growing, _ = budget.hold(30), budget.hold(50)
    with pytest.raises(ServeError):
        growing.add(21)
    assert budget.held == 80
    growing.set(10)
    assert budget.held == 60


def test_what_passes_counts_while_it_lasts() -> None:
    budget = ByteBudget(100, "s")
    share, other = budget.hold(10), budget.hold(20)
    with share.passing() as grow:
        grow(50)
        assert budget.held == 80
        with pytest.raises(ServeError):
            grow(21)
    assert budget.held == 30
    with share.passing() as grow:
        grow(5)
        share.release()
    assert budget.held == other.nbytes == 20


def test_a_released_share_does_not_grow_again() -> None:
    budget = ByteBudget(100, "s")
    late = budget.hold(10)
    late.release()
    late.add(50)
    late.set(70)
    assert budget.held == 0


class Sending:
    """The ASGI ``receive`` of a request whose client sends these pieces; then it is silent, or it has ended."""

    def __init__(self, *pieces: bytes, silent: bool = False) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)
        self._left, self._silent = len(pieces), silent
        self.taken = 0

    async def __call__(self) -> dict[str, Any]:
        piece = next(self._pieces, None)
        if piece is None:
            await asyncio.Event().wait()
        assert piece is not None
        self.taken += 1
        return {"type": "http.request", "body": piece, "more_body": self._silent or self.taken < self._left}


def _request(length: str | None = None) -> dict[str, Any]:
    headers = [] if length is None else [(b"content-length", length.encode())]
    return {"type": "http", "method": "POST", "path": "/", "headers": headers}


@pytest.mark.asyncio
async def test_a_body_is_refused_before_it_is_read_if_its_length_does_not_fit() -> None:
    budget = ByteBudget(100, "s")
    held, hold = budget.hold(50), budget.hold()
    with pytest.raises(ServeError) as caught:
        await read_body(_request("60"), Sending(b"x" * 60), 1000, hold)
    assert caught.value.code == "capacity_exhausted"
    assert budget.held == 50
    held.release()
    assert await read_body(_request("60"), Sending(b"x" * 60), 1000, hold) == b"x" * 60
    assert budget.held == 60


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "length", ["1001", "0" * 30 + "1001", "9" * 18, "9" * 19, "1" + "0" * 19, "9" * 20, "9" * 5000]
)
async def test_a_body_that_is_announced_too_long_is_refused_before_it_is_read(length: str) -> None:
    sending = Sending(b"x")
    with pytest.raises(ServeError) as caught:
        await read_body(_request(length), sending, 1000)
    assert (caught.value.code, sending.taken) == ("body_too_large", 0)


@pytest.mark.asyncio
async def test_zeros_before_a_length_are_none() -> None:
    assert await read_body(_request("0" * 30 + "1"), Sending(b"x"), 1000) == b"x"


@pytest.mark.asyncio
async def test_a_body_of_unknown_length_is_counted_as_it_arrives() -> None:
    budget = ByteBudget(100, "s")
    _, hold = budget.hold(50), budget.hold()
    sending = Sending(*[b"x" * 10] * 8)
    with pytest.raises(ServeError) as caught:
        await read_body(_request(), sending, 1000, hold)
    assert caught.value.code == "capacity_exhausted"
    assert sending.taken == 6  # the server drops the rest, so that the client sees the response
    assert hold.nbytes == 50


@pytest.mark.asyncio
async def test_a_body_that_stops_arriving_is_refused() -> None:
    with pytest.raises(ServeError) as caught:
        await read_body(_request(), Sending(b"{", silent=True), 1000, pace=Pace(stall_seconds=0.01))
    assert (caught.value.code, caught.value.http_status) == ("body_timeout", 408)


@pytest.mark.asyncio
async def test_a_body_that_trickles_is_refused_although_it_is_never_silent() -> None:
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"a", "more_body": True}

    with pytest.raises(ServeError) as caught:
        await read_body(_request(), receive, 1 << 30, pace=Pace(stall_seconds=0.1, least_rate=1e6))
    assert caught.value.code == "body_timeout"
    assert taken > 1


def test_a_body_of_known_length_must_be_able_to_end_in_time() -> None:
    pace = Pace(stall_seconds=10, least_rate=1000, total_seconds=100)
    assert pace.seconds_until(0, 0) == 10
    assert pace.seconds_until(5000, 0) == 15
    assert pace.seconds_until(5000, 1_000_000) == 10.5  # 10 kB/s


def test_a_client_alone_cannot_hold_what_is_for_all() -> None:
    budget = ByteBudget(100, "all", 50, "one")
    first = budget.hold(60, client="a")  # however large, it is the only one of its client
    with pytest.raises(ServeError, match=r"of this client .*\(one\)"):
        budget.hold(1, client="a")
    other = budget.hold(40, client="b")
    with pytest.raises(ServeError, match=r"\(all\)"):
        budget.hold(1, client="c")
    first.release()
    assert budget.hold(50, client="a").nbytes == 50
    other.release()
    assert budget.held == 50


@pytest.mark.parametrize("length", [0, 1, 2, 3, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 7])
def test_base64_is_decoded_in_pieces(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    text = base64.b64encode(data).decode()
    assert decode_base64(text) == data
    assert decode_base64("data:," + text, 6) == data
    broken_up = "\n ".join(text[at : at + 77] for at in range(0, len(text), 77))
    assert decode_base64(broken_up + "\n") == data


@pytest.mark.parametrize(
    "text", ["A", "A===", "AA==AAAA", "AA=A", "A!AA", "ÄAAA", "=AAA", "A" * (PIECE_BYTES - 2) + "==" + "AAAA"]
)
def test_text_that_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_base64(text)
