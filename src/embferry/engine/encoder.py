"""The encode side of a model: vision tower and merger. The weights of the language side are never opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
import xxhash

from embferry.engine.checkpoint import Checkpoint
from embferry.engine.embedding import Embedding, row_bytes, token_fields
from embferry.engine.families import family_of
from embferry.engine.families.base import Family, Part
from embferry.engine.media import MediaItem, MediaProcessor, PreparedItem
from embferry.engine.shape import merged_positions
from embferry.protocol.layout import Field


class Encoder:
    """Encodes prepared items, one item in each call of the tower.

    An embedding then depends on its item alone. The result for a picture that is encoded together with others
    can differ in the last bits, because a matrix product with more rows may be split into other blocks.
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
        """Loads the vision tower of a model. Arguments and errors are those of :meth:`LanguageModel.load`."""
        torch.set_num_threads(threads)
        checkpoint = Checkpoint(path)
        config, family = checkpoint.config, family_of(checkpoint.config)
        tower = checkpoint.build(family, Part.VISION, family.vision_class, config.vision_config, dtype, attn)
        how = (str(dtype), attn, str(threads), torch.__version__, transformers.__version__)
        fingerprint = _fingerprint(config.vision_config, tower.state_dict(), how)
        return cls(family, config, tower, MediaProcessor.load(path, fingerprint))

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a visual token, in the order of the transfer's layout."""
        return token_fields(self.family, self.config, self._tower.dtype)

    def prepare(self, items: Iterable[MediaItem]) -> list[PreparedItem]:
        """Preprocesses the items; raises the MediaError of the first that cannot be prepared."""
        return [self.media.prepare(item) for item in items]

    @torch.inference_mode()
    def encode(self, item: PreparedItem) -> Embedding:
        """Returns the embedding of one item, on the CPU."""
        pixels = item.pixel_values.to(self._tower.dtype)
        output = self._tower(pixels, grid_thw=torch.tensor([item.grid_thw]), return_dict=True)
        embeddings, deepstack = self.family.visual_rows(output)
        token = self.config.image_token_id if item.kind == "image" else self.config.video_token_id
        tensors = {
            "input_embeddings": embeddings.contiguous(),
            "fill_ids": torch.full((item.num_tokens, 1), token, dtype=torch.int32),
            "mrope_positions": merged_positions(item.grid_thw, self.media.merge_size),
        }
        if deepstack is not None:
            tensors["deepstack_embeddings"] = deepstack.contiguous()
        return Embedding(item.shape, tensors)


def _fingerprint(config: Any, tensors: dict[str, torch.Tensor], how: Sequence[str]) -> bytes:
    """Returns a digest of the tower's weights, its shape, and all else that affects the last bits of its output."""
    digest = xxhash.xxh3_128(json.dumps([config.to_dict(), *how], sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(row_bytes(tensors[name].reshape(1, -1)).data)
    return digest.digest()
