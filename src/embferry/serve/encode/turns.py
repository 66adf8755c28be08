"""The requests whose items are to be encoded, and whose turn it is.

Clients take turns item by item, and so do the requests of a client: neither a request with many items nor a client with
many requests delays the others for long. A request whose next item is being looked up in the cache that encoders share
lets the others go first.
"""

from __future__ import annotations

import time
from collections import deque

from embferry.disaggregation.multimodal_embedding import MultimodalEmbeddingRequest
from embferry.serve.encode.room import Room
from embferry.serve.encode.shared_cache import SharedCache


class Turns:
    """The requests of one worker. The caller holds the worker's lock."""

    def __init__(self, shared: SharedCache | None) -> None:
        self._shared = shared
        # By client, in the order of turns; no queue is empty.
        self._waiting: dict[str, deque[MultimodalEmbeddingRequest]] = {}
        self._searching: list[MultimodalEmbeddingRequest] = []  # whose next item is being looked up

    def begin(self, request: MultimodalEmbeddingRequest) -> None:
        """Adds a new request, and begins to look up its items."""
        room: Room = request.req
        if self._shared is not None:
            room.lookups.extend(map(self._shared.search, room.waiting))
        self.add(request)

    def add(self, request: MultimodalEmbeddingRequest) -> None:
        """Adds a request behind the others of its client."""
        room: Room = request.req
        if self._shared is not None and room.lookups and self._shared.is_searching(room.lookups[0]):
            self._searching.append(request)
        else:
            self._waiting.setdefault(room.client, deque()).append(request)

    def next(self) -> MultimodalEmbeddingRequest | None:
        """Takes the next request of the client whose turn it is."""
        searching, self._searching = self._searching, []
        for request in searching:
            self.add(request)
        if not self._waiting:
            return None
        client = next(iter(self._waiting))
        queue = self._waiting.pop(client)
        request = queue.popleft()
        if queue:
            self._waiting[client] = queue  # behind the others
        return request

    def seconds(self) -> float | None:
        """Returns after how many seconds a lookup is given up; None if there is none."""
        until = [one.until for request in self._searching for one in request.req.lookups if one is not None]
        return max(0.0, min(until) - time.monotonic()) if until else None
