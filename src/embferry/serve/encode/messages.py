"""``POST /encode``: the router's request (MessagePack) and the worker's response (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from embferry.engine.media import PreparedItem
from embferry.serve.config import LEAST_FPS, MOST_FPS


class EncodeItem(Struct, frozen=True):
    """A picture (``data``), a video file (``data``, ``fps``) or a video as pictures (``frames``, ``fps``).

    ``param``: its place in the client's request, for errors.
    """

    kind: Literal["image", "video"]
    data: bytes | None = None
    frames: Annotated[list[bytes], Meta(max_length=65_536)] | None = None
    fps: Annotated[float, Meta(ge=LEAST_FPS, le=MOST_FPS)] | None = None
    param: Annotated[str, Meta(max_length=512)] = ""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.frames is None) or (self.kind == "image" and self.data is None):
            raise ValueError("an image has data, a video has either data or frames")


class EncodeRequest(Struct, frozen=True):
    """The items of one room. The router draws the room's number at random and uses it once.

    ``client``: the router's name for the client, whose pictures and videos take turns with those of others.
    """

    room: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    request_id: Annotated[str, Meta(max_length=512)]
    items: Annotated[list[EncodeItem], Meta(min_length=1, max_length=4096)]
    client: Annotated[str, Meta(max_length=512)] = ""


DECODER = msgspec.msgpack.Decoder(EncodeRequest)


def response(room: int, endpoint: str, items: Sequence[PreparedItem]) -> dict[str, Any]:
    """Returns the response: the endpoint of the embedding and the shape of each item, for the language worker."""
    return {
        "room": room,
        "endpoint": endpoint,
        "items": [
            {
                "kind": item.kind,
                "grid_thw": list(item.grid_thw),
                "num_tokens": item.num_tokens,
                "timestamps": list(item.timestamps),
                "digest": item.digest.hex(),
            }
            for item in items
        ],
        "total_tokens": sum(item.num_tokens for item in items),
    }
