"""Two producers, a consumer, and a stub router between them."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

import msgspec
import pytest

from embferry import PeerGone
from embferry.connectors.vllm.coordinates import KEY, Coordinates
from embferry.connectors.vllm.router_client import RouterClient
from embferry.testing.proxy import ChaosProxy

from .pair import CONFIG, GUARD_S, Encode, Language, with_peer_timeout
from .stub_router import Answer, StubRouter

TCP = msgspec.structs.replace(CONFIG, transports=("tcp",))
TOKEN = "the-token"


class Routed:
    def __init__(self, *, wait_s: float = GUARD_S, peer_timeout: float = GUARD_S, **stub: Any) -> None:
        """``wait_s`` is how long the consumer waits for the router; ``stub`` are arguments of :class:`StubRouter`."""
        self._stack = ExitStack()
        self.stub = self._stack.enter_context(StubRouter(**stub))
        self.router = self._stack.enter_context(closing(RouterClient(self.stub.url, wait_s)))
        self.first, self.second = (self._stack.enter_context(closing(Encode(TCP))) for _ in range(2))
        config = with_peer_timeout(TCP, peer_timeout)
        self.language = self._stack.enter_context(closing(Language(config, self.router)))
        self.count = self.language.count

    def dying(self, coordinates: Coordinates) -> Coordinates:
        """Returns the same coordinates through a proxy that dies after a part of the transfer."""
        assert coordinates.endpoint is not None
        port = int(coordinates.endpoint.rpartition(":")[2])
        proxy = self._stack.enter_context(ChaosProxy(port, cut_after=1500, dies=True))
        return msgspec.structs.replace(coordinates, endpoint=f"tcp://127.0.0.1:{proxy.port}")

    def dying_offer(self) -> Coordinates:
        """Offers an embedding of the first producer, whose transfer stops in the middle."""
        self.first.publish("a")
        return self.dying(self.first.offer("a", token=TOKEN))

    def at_second(self, room: int, seed: int = 0) -> Answer:
        """Offers an embedding at the second producer, and returns the router's answer with it."""
        self.second.publish("a", seed)
        return answer(self.second.offer("a", room, TOKEN))

    def fails(self, coordinates: Coordinates, match: str | None = None) -> None:
        with pytest.raises(PeerGone, match=match):
            self.language.fetch("r", "a", coordinates)

    def close(self) -> None:
        self._stack.close()


def answer(coordinates: Coordinates) -> Answer:
    return 200, {KEY: msgspec.to_builtins(coordinates)}
