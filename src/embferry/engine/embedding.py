"""The fields of a token, and the embedding of one item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embferry.engine.families import Family
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
    """The fields every token of a model's embeddings has; both sides compute the same from ``config.json``."""
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
    """What the vision tower makes of one item: n rows, one a token.

    Attributes:
        shape: the item it is of, with its digest.
        input_embeddings: ``[n, hidden]``.
        deepstack_embeddings: ``[n, levels × hidden]``, level after level in a row, or None.
        fill_ids: int32 ``[n]``, the placeholder token the row takes the place of.
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
        """Field name → ``[n, width]``."""
        fields = {
            "input_embeddings": self.input_embeddings,
            "fill_ids": self.fill_ids.unsqueeze(1),
            "mrope_positions": self.mrope_positions,
        }
        if self.deepstack_embeddings is not None:
            fields["deepstack_embeddings"] = self.deepstack_embeddings
        return fields

    def fields(self) -> dict[str, np.ndarray]:
        """Field name → its bytes, uint8 ``[n, row_bytes]``: views of the tensors, not copies."""
        return {name: row_bytes(tensor) for name, tensor in self.tensors().items()}


def row_bytes(rows: torch.Tensor) -> np.ndarray:
    """A contiguous ``[n, width]`` tensor on the CPU seen as uint8 ``[n, row_bytes]``."""
    if not rows.is_contiguous():
        raise ValueError("the rows of a field must be contiguous to be seen as bytes")
    view: np.ndarray = rows.view(torch.uint8).numpy()
    return view


def from_bytes(spec: FieldSpec, rows: np.ndarray) -> torch.Tensor:
    """uint8 ``[n, row_bytes]`` → ``[n, width]``, sharing memory; the inverse of :func:`row_bytes`."""
    return torch.from_numpy(rows).view(spec.dtype)


def concatenate(embeddings: list[Embedding]) -> Mapping[str, torch.Tensor]:
    """The embeddings of a prompt's items, in order, as one stream of tokens: field name → ``[N, width]``."""
    if len(embeddings) == 1:
        return embeddings[0].tensors()
    each = [embedding.tensors() for embedding in embeddings]
    return {name: torch.cat([fields[name] for fields in each]) for name in each[0]}
