"""Pictures, videos and sounds to which clients have given a ``uuid``, so that later requests need not send them again.

A name belongs to the client that gave it: the same name of another client is another name. What a client sends under a
name counts from then on, so the file of a request is always the one that is answered about.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.vllm.items import Item
from embferry.serve.vllm.media_parts import WORDS, Kind, MediaPart
from embferry.serve.vllm.metrics import VllmRouterMetrics

MAX_NAMES = 16_384
"""Names of all clients together."""

Name = tuple[Kind, str]


@dataclass(slots=True)
class _Named:
    """A file. ``url``: a ``data:`` URL."""

    url: str
    used_at: float

    @property
    def nbytes(self) -> int:
        return len(self.url)


class _Owned:
    """The names of one client, the least recently used first."""

    def __init__(self) -> None:
        self.named: OrderedDict[Name, _Named] = OrderedDict()
        self.nbytes = 0

    def pop(self, name: Name) -> None:
        self.nbytes -= self.named.pop(name).nbytes


class NamedMedia:
    """The names of all clients, for one event loop.

    Args:
        max_bytes: bytes of all files together; 0 keeps none.
        seconds: how long a name is kept after its last use.
        metrics: the router's.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        seconds: float,
        metrics: VllmRouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._seconds, self._clock = max_bytes, seconds, clock
        self._outcomes = metrics.named_media
        self._owned: dict[str, _Owned] = {}
        self._order: OrderedDict[tuple[str, Name], None] = OrderedDict()  # of all names, the least recently used first
        self.nbytes = 0
        metrics.named_bytes.set_function(lambda: self.nbytes)

    @property
    def is_on(self) -> bool:
        """Whether names are kept."""
        return self._max_bytes > 0

    def resolved(self, owner: str, parts: Sequence[MediaPart], grow: Callable[[int], object]) -> list[MediaPart]:
        """Returns the parts, with their file for those that have a name alone.

        A name of the request itself goes before one of an earlier request.

        Args:
            owner: the client.
            parts: those of a request.
            grow: called with the bytes of each file that was not in the request; may raise ServeError.

        Raises:
            ServeError: unknown_media_uuid, with the part in ``param``.
        """
        self._expire()
        own = {(part.kind, part.uuid): part.url for part in parts if part.url and part.uuid is not None}
        found = [part if part.url else replace(part, url=self._url(owner, part, own)) for part in parts]
        grow(sum(len(part.url) for part, sent in zip(found, parts, strict=True) if not sent.url))
        return found

    def keep(self, owner: str, parts: Sequence[MediaPart], items: Sequence[Item]) -> None:
        """Keeps the files of the parts that have a name, or notes that they were used.

        Args:
            owner: the client.
            parts: those of a request.
            items: the file of each.
        """
        self._expire()
        for part, item in zip(parts, items, strict=True):
            if part.uuid is not None:
                self._put(owner, (part.kind, part.uuid), item.url)

    def _url(self, owner: str, part: MediaPart, own: dict[Name, str]) -> str:
        assert part.uuid is not None  # a part without a file has a name
        name = (part.kind, part.uuid)
        if name in own:
            return own[name]
        found = self._owned[owner].named.get(name) if owner in self._owned else None
        self._outcomes.labels("unknown" if found is None else "found").inc()
        if found is None:
            word = WORDS[part.kind]
            why = f"this client has sent no {word} with the uuid {shown(part.uuid, 80)} that is still kept"
            where = f"(vllm.uuid_bytes, vllm.uuid_timeout); send the {word} itself, with the uuid"
            raise ServeError("unknown_media_uuid", f"{why} {where}", param=part.param)
        return found.url

    def _put(self, owner: str, name: Name, url: str) -> None:
        self._drop(owner, name)
        new = _Named(url, self._clock())
        if new.nbytes > self._max_bytes:
            return
        owned = self._owned.setdefault(owner, _Owned())
        owned.named[name] = new
        owned.nbytes += new.nbytes
        self.nbytes += new.nbytes
        self._order[owner, name] = None
        while self.nbytes > self._max_bytes or len(self._order) > MAX_NAMES:
            most = max(self._owned, key=self._bytes_of if self.nbytes > self._max_bytes else self._names_of)
            self._drop(most, next(iter(self._owned[most].named)))

    def _drop(self, owner: str, name: Name) -> None:
        owned = self._owned.get(owner)
        if owned is None or name not in owned.named:
            return
        self.nbytes -= owned.named[name].nbytes
        owned.pop(name)
        del self._order[owner, name]
        if not owned.named:
            del self._owned[owner]

    def _bytes_of(self, owner: str) -> int:
        return self._owned[owner].nbytes

    def _names_of(self, owner: str) -> int:
        return len(self._owned[owner].named)

    def _expire(self) -> None:
        """Forgets the names that have not been used for long."""
        before = self._clock() - self._seconds
        while self._order:
            owner, name = next(iter(self._order))
            if self._owned[owner].named[name].used_at > before:
                return
            self._drop(owner, name)
