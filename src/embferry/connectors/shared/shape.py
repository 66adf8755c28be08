"""The shape of an embedding in an engine, and the digest of its bytes."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from embferry import Field, Layout
from embferry.protocol.layout import MAX_DTYPE, MAX_WIDTH
from embferry.protocol.messages import MAX_TOKENS

Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
Width = Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]
Dtype = Annotated[str, msgspec.Meta(max_length=MAX_DTYPE)]


class Shape(NamedTuple):
    """Tokens of an embedding, elements per token, and the name of the elements' type, such as "bfloat16"."""

    tokens: Tokens
    width: Width
    dtype: Dtype

    @property
    def layout(self) -> Layout:
        """One field: vLLM has one tensor per item, in which deepstack's levels stand side by side."""
        return Layout((Field("input_embeddings", self.dtype, self.width),))

    @property
    def token_bytes(self) -> int:
        """Bytes per token. Raises LayoutMismatch for a dtype that cannot be transferred."""
        layout = self.layout
        layout.validate()
        return layout.token_bytes

    @property
    def nbytes(self) -> int:
        return self.tokens * self.token_bytes


def digest_of(rows: npt.NDArray[np.uint8], shape: Shape) -> bytes:
    """Returns the xxh3-128 of the shape and the bytes of ``rows``, uint8 [tokens, bytes per token]."""
    state = xxhash.xxh3_128(f"{shape.dtype} {shape.tokens} {shape.width}".encode())
    state.update(rows.data)
    return bytes(state.digest())
