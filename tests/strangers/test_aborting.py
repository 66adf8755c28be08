"""Strangers that end what others have begun."""

from __future__ import annotations

import pytest

from embferry.protocol.messages import Abort, Closed, Drain, Unknown
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


def test_strangers_end_no_transfer_even_if_they_know_its_room(running: Running, stranger: Stranger) -> None:
    with running.untouched(asking=True), running.live_room() as room:
        stranger.request("encode", "DELETE", f"/rooms/{room}")
        ends = (Abort(room, "aborted", "by a stranger"), Closed(room), Unknown(room, 1), Drain(room, (1,)))
        for target in (0, 1, 77):
            stranger.send_frames(*ends, target=target)
        for token in ("0" * 32, "f" * 32):
            stranger.request("http", "DELETE", f"/embferry/1/{token}")
    running.ask()
