"""Producer, in the scheduler: serves what its workers made, and says where."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from embferry import EmbeddingSender, SendManager, as_fields
from embferry.protocol.errors import EmbeddingTransferError, PeerGone
from embferry.protocol.layout import Layout
from embferry.protocol.states import KVPoll

from .config import ConnectorConfig
from .coordinates import Coordinates, layout_of
from .offers import Offers
from .shelf import Kept, Shelf
from .tally import Tally

ENDED = {KVPoll.Success: "fetched", KVPoll.Failed: "unfetched"}


class Producer:
    """One sending manager for each layout that the model's encoders have: almost always one."""

    def __init__(self, config: ConnectorConfig, name: str, tally: Tally) -> None:
        self._config, self._tally = config, tally
        self._managers: dict[Layout, SendManager] = {}
        self._needs: dict[str, frozenset[str]] = {}  # by request
        self._rooms: dict[int, tuple[EmbeddingSender, Coordinates]] = {}
        self.shelf = Shelf(name, config.cache_bytes, tally)
        self.offers = Offers(config.offered_bytes, self.shelf.put)
        tally.gauge("offered_bytes", lambda: self.offers.nbytes)
        tally.gauge("kept_bytes", lambda: self.shelf.nbytes)

    def needs(self, request: str, names: Iterable[str]) -> set[str]:
        """Keeps what the request needs until it has finished. Answers what is missing: a worker may have it."""
        if request not in self._needs:
            self._needs[request] = frozenset(names)
            self.shelf.hold(self._needs[request])
        return {mm_hash for mm_hash in self._needs[request] if self.find(mm_hash) is None}

    def finished(self, request: str) -> None:
        self.shelf.release(self._needs.pop(request, frozenset()))

    def find(self, mm_hash: str) -> Kept | None:
        """An embedding that need not be encoded."""
        return self.shelf.find(mm_hash) or self.offers.find(mm_hash)

    def offer(self, mm_hash: str, room: int | None = None) -> dict[str, Any]:
        """Where the embedding can be fetched once, as plain data.

        :param room: the one to offer it in; a new one if None. In a room where the same is offered already, it stays.
        :raises PeerGone: it is not here.
        :raises CapacityError: too much is promised and has not been fetched.
        :raises LocalProtocolError: another embedding is offered in that room.
        """
        kept = self.find(mm_hash)
        if kept is None:
            raise PeerGone(f"the embedding {mm_hash} has not come from the worker, or is gone; encode it again")
        where = self._already(kept, room) or self._open(kept, secrets.randbits(63) if room is None else room)
        self._tally.add("items_offered")
        self._tally.add("encodes_saved", 0 if kept.is_new else 1)
        kept.is_new = False
        plain: dict[str, Any] = msgspec.to_builtins(where)
        return plain

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self.shelf.close()

    def _already(self, kept: Kept, room: int | None) -> Coordinates | None:
        if room is None or room not in self._rooms:
            return None
        sender, where = self._rooms[room]
        if sender.poll() in ENDED or where.digest != kept.item.digest.hex():
            return None  # to open the room again tells whether that can be
        return where

    def _open(self, kept: Kept, room: int) -> Coordinates:
        item, tokens = kept.item, len(kept.rows)
        manager = self._manager(layout_of(item.dtype, item.width))
        kept = self.offers.begin(kept, room)
        try:
            sender = manager.open(room)
        except EmbeddingTransferError:
            self.offers.end(kept, room)
            raise
        where = Coordinates(manager.endpoint, room, tokens, item.width, item.dtype, item.digest.hex())
        self._rooms[room] = (sender, where)
        sender.on_change(lambda: self._changed(sender, kept))
        sender.init(tokens, item.digest)
        sender.send_embedding(as_fields({"input_embeddings": kept.rows}))
        return where

    def _changed(self, sender: EmbeddingSender, kept: Kept) -> None:
        """On the manager's thread: so a room ends without any step of a worker."""
        if not sender.source_released:
            return
        known = self._rooms.get(sender.room)
        if known is not None and known[0] is sender:
            self._rooms.pop(sender.room, None)
            self._tally.add("offers_ended", label=ENDED[sender.machine.poll()])
        self.offers.end(kept, sender.room)

    def _manager(self, layout: Layout) -> SendManager:
        manager = self._managers.get(layout)
        if manager is None:
            config = self._config
            manager = self._managers[layout] = SendManager(
                layout, config.make_transports(), host=config.host, advertise=config.advertise, settings=config.sending
            )
        return manager
