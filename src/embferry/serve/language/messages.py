"""``POST /generate``: the router's request (JSON) and the worker's events (JSON, one per line)."""

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


class TextPart(Struct, frozen=True, tag="text"):
    text: str


class ImagePart(Struct, frozen=True, tag="image"):
    item: int


class VideoPart(Struct, frozen=True, tag="video"):
    item: int


class Message(Struct, frozen=True):
    role: str
    parts: list[TextPart | ImagePart | VideoPart]


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
    """A prompt. ``room`` and ``endpoint`` come from the encode worker's response; null if there are no items."""

    request_id: Annotated[str, Meta(max_length=512)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    room: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    endpoint: Annotated[str, Meta(pattern=r"^tcp://.+:\d{1,5}$", max_length=512)] | None = None
    items: list[Item] = []
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if self.items and (self.room is None or self.endpoint is None):
            raise ValueError("a request with items needs the room and endpoint of their embedding")
        parts = [(p.item, _KINDS[type(p)]) for m in self.messages for p in m.parts if not isinstance(p, TextPart)]
        if parts != [(index, item.kind) for index, item in enumerate(self.items)]:
            raise ValueError("the messages must name each item once, in order, with its kind")

    @property
    def shapes(self) -> list[MediaShape]:
        return [item.shape for item in self.items]

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as the engine's prompt builder takes them."""
        return [{"role": m.role, "content": [_content(part) for part in m.parts]} for m in self.messages]


_KINDS: dict[type, str] = {ImagePart: "image", VideoPart: "video"}
_DECODER = msgspec.json.Decoder(GenerateRequest)


def _content(part: TextPart | ImagePart | VideoPart) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": _KINDS[type(part)]}


def parse(body: bytes) -> GenerateRequest:
    """Decodes a request.

    Raises:
        ServeError: invalid_request.
    """
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServeError("invalid_request", f"the body is not a valid generate request: {error}") from error


def line(event: dict[str, Any] | ServeError) -> bytes:
    """Returns one event as a line of the response."""
    fields = {"type": "error", **error_body(event)} if isinstance(event, ServeError) else event
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


PING = line({"type": "ping"})
