"""The fields of a visual token, and the embedding of one media item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embferry.engine.families.base import Family
from embferry.engine.shape import MediaShape


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a token: ``width`` numbers of ``dtype``."""

    name: str
    dtype: torch.dtype
    width: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


def token_fields(family: Family, config: Any, dtype: torch.dtype) -> tuple[FieldSpec, ...]:
    """Returns the fields of a visual token of a model. Both sides compute the same from ``config.json``."""
    hidden, levels = int(config.text_config.hidden_size), family.deepstack_levels(config)
    deepstack = (FieldSpec("deepstack_embeddings", dtype, levels * hidden),) if levels else ()
    return (
        FieldSpec("input_embeddings", dtype, hidden),
        FieldSpec("fill_ids", torch.int32, 1),
        FieldSpec("mrope_positions", torch.int32, 3),
        *deepstack,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The output of the vision tower for one item, which is ``n`` visual tokens.

    Attributes:
        shape: The shape of the item, with its digest.
        input_embeddings: ``[n, hidden]`` in the tower's dtype.
        deepstack_embeddings: ``[n, levels × hidden]`` in the same dtype, the levels side by side; or None.
        fill_ids: int32 ``[n]``, the id of the placeholder token that each visual token replaces.
        mrope_positions: int32 ``[n, 3]``, time, row and column of the merged patch within the item.
    """

    shape: MediaShape
    input_embeddings: torch.Tensor
    deepstack_embeddings: torch.Tensor | None
    fill_ids: torch.Tensor
    mrope_positions: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.input_embeddings.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns field name → tensor ``[n, width]``."""
        fields = {
            "input_embeddings": self.input_embeddings,
            "fill_ids": self.fill_ids.unsqueeze(1),
            "mrope_positions": self.mrope_positions,
        }
        if self.deepstack_embeddings is not None:
            fields["deepstack_embeddings"] = self.deepstack_embeddings
        return fields

    def fields(self) -> dict[str, np.ndarray]:
        """Returns field name → bytes, uint8 ``[n, row_bytes]``, as views of the tensors."""
        return {name: row_bytes(tensor) for name, tensor in self.tensors().items()}


def row_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Returns a contiguous CPU tensor ``[n, width]`` as uint8 ``[n, row_bytes]``, sharing memory."""
    if not tensor.is_contiguous():
        raise ValueError("the tensor of a field must be contiguous to be viewed as bytes")
    view: np.ndarray = tensor.view(torch.uint8).numpy()
    return view


def from_bytes(spec: FieldSpec, rows: np.ndarray) -> torch.Tensor:
    """Returns uint8 ``[n, row_bytes]`` as ``[n, width]``, sharing memory; the inverse of :func:`row_bytes`."""
    return torch.from_numpy(rows).view(spec.dtype)
