"""An embedding as the sending side holds it: the bytes of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Layout

Array = npt.NDArray[np.uint8]
Fields = Mapping[str, Array]
"""Field name to its bytes, uint8 [tokens, bytes a token], rows contiguous."""


def as_fields(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Array]:
    """Returns views of arrays [tokens, ...] of any dtype as :data:`Fields`, without a copy.

    Raises:
        LocalProtocolError: An array is not contiguous.
    """
    fields = {}
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise LocalProtocolError(f"field {name} is not contiguous; pass numpy.ascontiguousarray of it")
        fields[name] = array.reshape(len(array), -1).view(np.uint8)
    return fields


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_fields(layout: Layout, fields: Mapping[str, _Shaped], total_tokens: int, room: int) -> None:
    """Checks the arrays of an embedding before any of them is read.

    Args:
        layout: The fields that the embedding must have.
        fields: Field name to its bytes, uint8 [total_tokens, bytes a token]: a contiguous array, or rows in device
            memory.
        total_tokens: The announced length.
        room: The ``bootstrap_room``, for the error.

    Raises:
        LocalProtocolError: A field is missing, not contiguous, or does not fit what was announced.
    """
    if not isinstance(fields, Mapping):
        raise LocalProtocolError(
            f"an embedding is a mapping of names to arrays, not {type(fields).__name__}", room=room
        )
    for field in layout.fields:
        array = fields.get(field.name)
        dtype = array.dtype if isinstance(array, np.ndarray) else np.dtype(np.uint8)
        if array is None or getattr(array, "shape", None) != (total_tokens, field.token_bytes) or dtype != np.uint8:
            have = "missing" if array is None else f"{dtype} {getattr(array, 'shape', type(array).__name__)}"
            need = f"uint8 ({total_tokens}, {field.token_bytes})"
            raise LocalProtocolError(f"field {field.name} is {have}; announced was {need}", room=room)
        if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
            raise LocalProtocolError(f"field {field.name} is not contiguous", room=room)
