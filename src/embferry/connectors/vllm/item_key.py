"""Keys of embeddings in the cache that encoders share: of the model, and of the content of an item."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import xxhash

VERSION = b"embferry vllm 1\0"
"""Part of every key: a version that encodes or reads otherwise finds nothing of this one."""


class Item(NamedTuple):
    """One item of a request.

    Attributes:
        mm_hash: vLLM's name for it.
        modality: "image" or "video", for example.
        data: What the encoder gets, by name. vLLM's elements, whose ``data`` are nested tensors.
        tokens: Rows of its embedding.
    """

    mm_hash: str
    modality: str
    data: Mapping[str, Any]
    tokens: int


def item_key(identity: bytes, item: Item) -> str:
    """Returns the key of an item's embedding: of the model, of vLLM's name, and of what the encoder gets.

    vLLM's name alone is not enough, since a client may give one name to two pictures.

    Returns:
        64 hexadecimal digits, or "" if the item's data is not in this process.
    """
    data = xxhash.xxh3_128()
    try:
        _add(data.update, {name: item.data[name].data for name in sorted(item.data)})
    except _Unreadable:
        return ""
    key = hashlib.sha256(VERSION)
    for part in (identity, item.modality.encode(), item.mm_hash.encode("utf-8", "surrogatepass"), data.digest()):
        key.update(len(part).to_bytes(8, "little") + part)
    key.update(item.tokens.to_bytes(8, "little"))
    return key.hexdigest()


class _Unreadable(Exception):  # noqa: N818  (it says what the data is)
    pass


def _add(update: Callable[[Any], object], value: Any) -> None:
    """Adds nested tensors to a digest, in a form that no other value has. Raises _Unreadable."""
    match value:
        case torch.Tensor():
            if not value.is_cpu or value.layout is not torch.strided:
                raise _Unreadable
            update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
            update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        case Mapping():
            update(f"map {len(value)}\n".encode())
            for name, each in value.items():
                _add(update, str(name))
                _add(update, each)
        case list() | tuple():
            update(f"list {len(value)}\n".encode())
            for each in value:
                _add(update, each)
        case str() | int() | float():
            text = repr(value).encode("utf-8", "surrogatepass")
            update(f"{type(value).__name__} {len(text)}\n".encode() + text)
        case _:
            raise _Unreadable
