"""Where an embedding is and what it is: what a producer answers with, and a consumer's request carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from embferry.protocol.errors import EmbeddingTransferError, LayoutMismatch, RemoteProtocolError
from embferry.protocol.layout import ITEM_BYTES, Field, Layout

KEY = "embferry"
"""Of the entry for an item in ``ec_transfer_params``: beside what vLLM itself puts there."""
REFUSED = "embferry_refused"
"""In its place, when an embedding cannot be offered: a code and a message."""
VERSION = 1
MAX_TOKEN_CHARACTERS = 128

Room = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
MAX_MULTIPLE = 32
"""A token is the language model's width, or a multiple: with deepstack, one more for each level."""


class Coordinates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``tokens`` rows of ``width`` elements of ``dtype``, in ``room`` of the producer at ``endpoint``.

    Without an endpoint it is offered nowhere: this consumer has had it. If it has it no more, it asks the router."""

    endpoint: str | None
    room: Room
    tokens: int
    width: int
    dtype: str
    digest: str
    version: int = VERSION
    replacement: Annotated[str, msgspec.Meta(max_length=MAX_TOKEN_CHARACTERS)] | None = None
    """The router's, opaque: with it, another producer can be had for the same room."""

    @property
    def layout(self) -> Layout:
        return layout_of(self.dtype, self.width)

    @property
    def nbytes(self) -> int:
        return self.tokens * self.width * ITEM_BYTES[self.dtype]

    def check(self, tokens: int, dtype: str, hidden: int) -> None:
        """Whether this is what the prompt has room for, in a model of this dtype and width.

        :raises RemoteProtocolError: another number of tokens, or another version of these parameters.
        :raises LayoutMismatch: another dtype, or a width that cannot be.
        """
        if self.version != VERSION:
            raise RemoteProtocolError(f"version {self.version} of the transfer parameters; this side has {VERSION}")
        if self.tokens != tokens:
            raise RemoteProtocolError(f"an embedding of {self.tokens} tokens where the prompt has room for {tokens}")
        if self.dtype != dtype or self.width % hidden or not 1 <= self.width // hidden <= MAX_MULTIPLE:
            why = f"{self.dtype}[{self.width}] there, {dtype}[{hidden}] here; serve the same model on both sides"
            raise LayoutMismatch(why)


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request asks of a producer: to offer its one item in this room."""

    room: Room


def layout_of(dtype: str, width: int) -> Layout:
    """One field: vLLM hands over one tensor an item, with deepstack's levels beside the embedding."""
    return Layout((Field("input_embeddings", dtype, width),))


def digest_of(rows: npt.NDArray[np.uint8], dtype: str, width: int) -> bytes:
    """Of content and shape: xxh3-128 over what it is and over its bytes."""
    state = xxhash.xxh3_128(f"{dtype} {len(rows)} {width}".encode())
    state.update(rows.data)
    return bytes(state.digest())


def coordinates_in(entry: Any) -> Coordinates | None:
    """The coordinates in an item's entry of ``ec_transfer_params``, or None if it has none of ours.

    :raises RemoteProtocolError: they are malformed.
    """
    ours = entry.get(KEY) if isinstance(entry, dict) else None
    if ours is None:
        return None
    try:
        return msgspec.convert(ours, Coordinates)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"malformed transfer parameters: {error}") from None


def entry_in(params: Any, name: str) -> Any:
    """What a request's ``ec_transfer_params`` have under ``name``, or None. vLLM lets anything through as these.

    :raises RemoteProtocolError: they are no table.
    """
    if params is None:
        return None
    if not isinstance(params, Mapping):
        raise RemoteProtocolError("malformed transfer parameters: ec_transfer_params is no object")
    return params.get(name)


def wish_in(params: Any) -> Wish | None:
    """The wish in an encode request's ``ec_transfer_params``, or None if it has none.

    :raises RemoteProtocolError: it is malformed.
    """
    ours = entry_in(params, KEY)
    if ours is None:
        return None
    try:
        return msgspec.convert(ours, Wish)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"malformed transfer parameters: {error}") from None


def refusal(error: EmbeddingTransferError) -> dict[str, str]:
    """An error as an item's entry has it."""
    return {"code": error.code, "message": error.detail}
