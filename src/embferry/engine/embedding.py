"""The fields of a visual token, and the embedding of one media item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embferry.engine.families.base import Family
from embferry.engine.shape import MediaShape
from embferry.protocol.layout import Field


def token_fields(family: Family, config: Any, dtype: torch.dtype) -> tuple[Field, ...]:
    """Returns the fields of a visual token of a model. Both sides compute the same from ``config.json``."""
    hidden, levels = int(config.text_config.hidden_size), family.deepstack_levels(config)
    name = str(dtype).removeprefix("torch.")
    deepstack = (Field("deepstack_embeddings", name, levels * hidden),) if levels else ()
    ids = (Field("fill_ids", "int32", 1), Field("mrope_positions", "int32", 3))
    return (Field("input_embeddings", name, hidden), *ids, *deepstack)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The output of the vision tower for one item, which is ``n`` visual tokens.

    Attributes:
        shape: The shape of the item, with its digest.
        tensors: The fields, each a contiguous tensor ``[n, width]`` on the CPU. In the tower's dtype are
            ``input_embeddings`` and, for some families, ``deepstack_embeddings``, the levels side by side. In int32 are
            ``fill_ids``, the id of the placeholder that a token replaces, and ``mrope_positions``, its time, row and
            column within the item.
    """

    shape: MediaShape
    tensors: dict[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return len(self.tensors["input_embeddings"])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fields(self) -> dict[str, np.ndarray]:
        """Returns field name → bytes, uint8 ``[n, row_bytes]``, as views of the tensors."""
        return {name: row_bytes(tensor) for name, tensor in self.tensors.items()}


def row_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Returns a contiguous CPU tensor ``[n, width]`` as uint8 ``[n, row_bytes]``, sharing memory."""
    if not tensor.is_contiguous():
        raise ValueError("the tensor of a field must be contiguous to be viewed as bytes")
    view: np.ndarray = tensor.view(torch.uint8).numpy()
    return view


def from_bytes(field: Field, rows: np.ndarray) -> torch.Tensor:
    """Returns uint8 ``[n, row_bytes]`` as ``[n, width]``, sharing memory; the inverse of :func:`row_bytes`."""
    return torch.from_numpy(rows).view(getattr(torch, field.dtype))
