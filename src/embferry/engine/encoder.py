"""The encode side of a model: vision tower and merger. The language weights are never opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
import xxhash

from embferry.engine.checkpoint import Checkpoint, build
from embferry.engine.embedding import Embedding, FieldSpec, row_bytes, token_fields
from embferry.engine.families import Family, family_of
from embferry.engine.families.base import Part
from embferry.engine.media import MediaItem, MediaProcessor, PreparedItem
from embferry.engine.shape import merged_positions


class Encoder:
    """Turns prepared items into embeddings, one item a call.

    One item a call makes the embedding a function of the item: the rows of a picture encoded together with others can
    differ in the last bits, since a matrix product may be cut into other blocks when it has more rows.
    """

    def __init__(self, family: Family, config: Any, tower: Any, media: MediaProcessor) -> None:
        self.family = family
        self.config = config
        self.media = media
        self._tower = tower

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16, attn: str = "sdpa", threads: int = 1
    ) -> Encoder:
        """
        Args:
            path: model directory.
            dtype: of the weights and of the embeddings.
            attn: attention implementation of transformers.
            threads: of torch, for the whole process; the last bits of a result depend on it.

        Raises:
            UnsupportedModel, CheckpointError.
        """
        torch.set_num_threads(threads)
        checkpoint = Checkpoint(path)
        family = family_of(checkpoint.config)
        tensors = checkpoint.read(family, Part.VISION, dtype)
        vision_config = checkpoint.config.vision_config
        how = (str(dtype), attn, str(threads), torch.__version__, transformers.__version__)
        fingerprint = _fingerprint(vision_config, tensors, how)
        tower = build(family.vision_class, vision_config, tensors, attn)
        return cls(family, checkpoint.config, tower, MediaProcessor.load(path, fingerprint))

    @property
    def fields(self) -> tuple[FieldSpec, ...]:
        """The fields of a token, as the transfer has to lay them out."""
        return token_fields(self.family, self.config, self._tower.dtype)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._tower.parameters())

    def prepare(self, items: Iterable[MediaItem]) -> list[PreparedItem]:
        """Raises MediaError for the first item that cannot be prepared."""
        return [self.media.prepare(item) for item in items]

    @torch.inference_mode()
    def encode(self, item: PreparedItem) -> Embedding:
        """The embedding of one item, on the CPU."""
        output = self._tower(
            item.pixel_values.to(self._tower.dtype), grid_thw=torch.tensor([item.grid_thw]), return_dict=True
        )
        embeddings, deepstack = self.family.visual_rows(output)
        token = self.config.image_token_id if item.kind == "image" else self.config.video_token_id
        return Embedding(
            shape=item.shape,
            input_embeddings=embeddings.contiguous(),
            deepstack_embeddings=None if deepstack is None else deepstack.contiguous(),
            fill_ids=torch.full((item.num_tokens,), token, dtype=torch.int32),
            mrope_positions=merged_positions(item.grid_thw, self.media.merge_size),
        )


def _fingerprint(config: Any, tensors: dict[str, torch.Tensor], how: Sequence[str]) -> bytes:
    """Identifies the tower: its weights, its shape, and all that decides the last bits of its output."""
    digest = xxhash.xxh3_128(json.dumps([config.to_dict(), *how], sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(row_bytes(tensors[name].reshape(1, -1)).data)
    return digest.digest()
