"""The rooms of an encode worker that sends whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from embferry.cache.contract import Store
from embferry.disaggregation.mooncake.conn_multimodal import EncodeManager
from embferry.engine.cache import Pin
from embferry.engine.embedding import row_bytes
from embferry.engine.encoder import Encoder
from embferry.engine.media import PreparedItem
from embferry.engine.prompt import PromptBuilder
from embferry.engine.whole_prompt import WholePrompt
from embferry.protocol.layout import Field
from embferry.serve.byte_budget import Hold
from embferry.serve.config import Settings
from embferry.serve.encode.messages import EncodeRequest
from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from embferry.transfer.fields import Fields


class PromptRoom(Room):
    """A request whose embedding is that of its whole prompt.

    Attributes:
        chat: The messages; set before :meth:`OriginEncodeService.prepare_all`.
        whole: The rows, once the media are decoded.
    """

    def __init__(self, number: int, hold: Hold, caller: str = "") -> None:
        super().__init__(number, hold, caller)
        self.chat: list[dict[str, Any]] = []
        self.whole: WholePrompt | None = None

    def set_items(self, items: Sequence[PreparedItem]) -> None:
        super().set_items(items)
        assert self.whole is not None, "prepare_all() sets it"
        self.total_tokens = self.whole.prompt.length
        self.aux = (0, self.whole.prompt.position_delta)
        self._set_encoded()

    def add(self, pin: Pin, fields: Sequence[Field]) -> tuple[Fields, int]:
        assert self.whole is not None, "prepare_all() sets it"
        self.waiting.popleft()
        with pin:
            self.whole.add(pin.embedding)
        return self._set_encoded()

    def _set_encoded(self) -> tuple[Fields, int]:
        """Sets the rows; none counts as encoded before all are, because this wire sends them at once."""
        assert self.whole is not None
        rows = {name: row_bytes(tensor) for name, tensor in self.whole.rows.items()}
        self.encoded = (rows, 0 if self.waiting else self.total_tokens)
        return self.encoded


class OriginEncodeService(EncodeService):
    """Embeds whole prompts.

    Args:
        encoder: The vision tower.
        manager: The manager of the origin's wire.
        settings: All of them.
        prompts: Builds the prompts.
        table: The embeddings of the text tokens, in the encoder's dtype.
        store: The cache that encoders share.
    """

    def __init__(
        self,
        encoder: Encoder,
        manager: EncodeManager,
        settings: Settings,
        prompts: PromptBuilder,
        table: torch.Tensor,
        store: Store | None = None,
    ) -> None:
        self._prompts, self._table = prompts, table
        super().__init__(encoder, manager, settings, store)

    def _new_room(self, request: EncodeRequest, hold: Hold, caller: str) -> Room:
        return PromptRoom(request.room, hold, caller)

    async def prepare_all(self, request: EncodeRequest, room: Room) -> list[PreparedItem]:
        """Decodes the media and builds the prompt, with the embeddings of its text.

        Raises:
            PromptError: No prompt can be built, or it is too long; and what the base raises.
        """
        assert isinstance(room, PromptRoom)
        items = await super().prepare_all(request, room)
        await self._in_turn(room, partial(self._build, items, room))
        return items

    def _build(self, items: Sequence[PreparedItem], room: PromptRoom) -> None:
        prompt = self._prompts.build(room.chat, [item.shape for item in items])
        room.hold.add(prompt.length * self.manager.layout.token_bytes)
        room.whole = WholePrompt(prompt, self._table, self.encoder.fields)
