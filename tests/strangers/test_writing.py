"""Strangers that ask workers for work, or write into their memory."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from embferry.transports.tcp import framing
from tests.serve.pictures import png
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


def test_strangers_get_no_work_done(running: Running, stranger: Stranger) -> None:
    item = {"kind": "image", "data": png(64, 64, "red")}
    encode = msgspec.msgpack.encode({"room": 1, "request_id": "x", "items": [item]})
    generate = msgspec.json.encode({"room": None, "request_id": "x", "messages": [{"role": "user", "parts": []}]})
    with running.untouched():
        stranger.request("encode", "POST", "/encode", encode)
        stranger.request("language", "POST", "/generate", generate)


def test_strangers_write_into_no_block(running: Running, stranger: Stranger) -> None:
    ranges = np.array([[0, 4096]], np.int64)
    with running.untouched():
        for token in (bytes(16), b"\xff" * 16):
            writes = b"".join(framing.head(epoch, epoch, ranges) + bytes(4096) for epoch in range(1, 9))
            stranger.send_after_greeting("tcp", framing.hello(token) + writes)
    running.ask()
