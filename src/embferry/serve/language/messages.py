"""``POST /generate``: the router's request (JSON) and the worker's events (JSON, one a line)."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from embferry.engine.sampling import SamplingParams
from embferry.engine.shape import MediaShape
from embferry.serve.errors import ServeError
from embferry.serve.worker.errors import error_body

Count = Annotated[int, Meta(ge=1, le=1 << 31)]


class Part(Struct, frozen=True):
    """Text, or the picture or video with the index ``item`` in the request's ``items``."""

    type: Literal["text", "image", "video"]
    text: str | None = None
    item: int | None = None

    def __post_init__(self) -> None:
        if (self.type == "text") != (self.text is not None):
            raise ValueError("a part of type text has a text, others have none")

    @property
    def content(self) -> dict[str, str]:
        """The part as the engine's prompt builder takes it."""
        return {"type": self.type} if self.text is None else {"type": "text", "text": self.text}


class Message(Struct, frozen=True):
    role: str
    parts: list[Part]


class Item(Struct, frozen=True):
    """A picture or video as the encode worker described it; ``digest`` is hexadecimal."""

    kind: Literal["image", "video"]
    grid_thw: tuple[Count, Count, Count]
    num_tokens: Count
    digest: Annotated[str, Meta(pattern="^([0-9a-f]{2}){0,64}$")] = ""
    timestamps: list[float] = []

    @property
    def shape(self) -> MediaShape:
        return MediaShape(self.kind, self.grid_thw, tuple(self.timestamps), bytes.fromhex(self.digest))


class Sampling(Struct, frozen=True):
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []

    @property
    def params(self) -> SamplingParams:
        """The parameters as the engine takes them.

        Raises:
            ParameterError: a value is out of range.
        """
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, self.seed, tuple(self.stop))


class GenerateRequest(Struct, frozen=True):
    """A prompt.

    Attributes:
        room: from the encode worker's response, as ``endpoint``; null if there are no items.
        client: the router's name for the client, whose prompts take turns with those of others.
    """

    request_id: Annotated[str, Meta(max_length=512)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    room: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    endpoint: Annotated[str, Meta(pattern=r"^(tcp|tls)://.+:\d{1,5}$", max_length=512)] | None = None
    items: list[Item] = []
    sampling: Sampling = Sampling()
    client: Annotated[str, Meta(max_length=512)] = ""

    def __post_init__(self) -> None:
        if self.items and (self.room is None or self.endpoint is None):
            raise ValueError("a request with items needs the room and endpoint of their embedding")
        parts = [(p.item, p.type) for m in self.messages for p in m.parts if p.type != "text"]
        if parts != [(index, item.kind) for index, item in enumerate(self.items)]:
            raise ValueError("the messages must name each item once, in order, with its kind")

    @property
    def shapes(self) -> list[MediaShape]:
        return [item.shape for item in self.items]

    @property
    def characters(self) -> int:
        """The number of characters of all texts and roles."""
        return sum(len(m.role) + sum(len(part.text or "") for part in m.parts) for m in self.messages)

    @property
    def count(self) -> int:
        """The number of messages and of their parts."""
        return len(self.messages) + sum(len(m.parts) for m in self.messages)

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as the engine's prompt builder takes them."""
        return [{"role": m.role, "content": [part.content for part in m.parts]} for m in self.messages]


DECODER = msgspec.json.Decoder(GenerateRequest)


PING: dict[str, Any] = {"type": "ping"}


def encoded(event: dict[str, Any] | ServeError) -> bytes:
    """Returns one event as JSON without line breaks."""
    fields = {"type": "error", **error_body(event)} if isinstance(event, ServeError) else event
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
