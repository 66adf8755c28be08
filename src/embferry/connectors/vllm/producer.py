"""Producer, in the scheduler: serves what its workers made, and says where."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from embferry.disaggregation.common.conn_multimodal import EmbeddingSendManager, rows_of
from embferry.disaggregation.protocol.layout import Layout

from .config import ConnectorConfig
from .coordinates import Coordinates, layout_of
from .shelf import Shelf


class Producer:
    """One sending manager for each layout that the model's encoders have: almost always one."""

    def __init__(self, config: ConnectorConfig, name: str) -> None:
        self._config = config
        self._managers: dict[Layout, EmbeddingSendManager] = {}
        self.shelf = Shelf(name, config.cache_bytes)

    def offer(self, mm_hash: str) -> dict[str, Any] | None:
        """A room in which the embedding can be fetched once, as plain data; None if it is no longer here."""
        kept = self.shelf.find(mm_hash)
        if kept is None:
            return None
        item, tokens = kept.item, len(kept.rows)
        layout = layout_of(item.dtype, item.width)
        manager = self._manager(layout)
        sender = manager.open(secrets.randbits(63))
        sender.init(tokens, item.digest)
        sender.send_embedding(rows_of({"input_embeddings": kept.rows}))
        where = Coordinates(manager.endpoint, sender.room, tokens, item.width, item.dtype, item.digest.hex())
        plain: dict[str, Any] = msgspec.to_builtins(where)
        return plain

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self.shelf.close()

    def _manager(self, layout: Layout) -> EmbeddingSendManager:
        manager = self._managers.get(layout)
        if manager is None:
            config = self._config
            manager = self._managers[layout] = EmbeddingSendManager(
                layout, config.roads(), host=config.host, advertise=config.advertise, settings=config.sending
            )
        return manager
