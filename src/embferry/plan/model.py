"""The numbers of a model that a plan needs, from its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from embferry.models.grid_rule import GridRule

from .errors import ModelUnknown, WorkloadInvalid

VALUE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
LIMITS = {
    "qwen2_vl": (4 * 28 * 28, 16384 * 28 * 28),
    "qwen2_5_vl": (4 * 28 * 28, 16384 * 28 * 28),
    "qwen3_vl": (65_536, 16_777_216),
}
"""Least and most pixels of a picture, by family, for a model without the settings of its processor."""


class Model(msgspec.Struct, frozen=True):
    """A model.

    Attributes:
        name: As the user named it.
        token_bytes: Bytes of a visual token of an embedding, deepstack included.
        rule: How its processor makes visual tokens of a picture; None if the files do not say.
    """

    name: str
    token_bytes: int
    rule: GridRule | None

    def tokens(self, width: int, height: int) -> int:
        """Returns the visual tokens of a picture.

        Raises:
            ModelUnknown: the model's files do not say.
            WorkloadInvalid: the processor refuses a picture of this size.
        """
        if self.rule is None:
            raise ModelUnknown(
                f"{self.name} has no rule for the tokens of a picture; give their number: --image-tokens TOKENS"
            )
        found = self.rule.tokens(width, height)
        if found is None:
            raise WorkloadInvalid(f"--size {width}x{height}: the model's processor refuses a picture of this shape")
        return math.prod(found)


def model(name: str, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Model:
    """Returns the numbers of a model.

    Args:
        name: As the user named it.
        config: ``config.json``.
        processor: ``preprocessor_config.json``, or what ``processor_config.json`` has under ``image_processor``; empty
            if there is neither.

    Raises:
        ModelUnknown: the configuration does not have them.
    """
    texts, vision = _section(config, "text_config") or config, _section(config, "vision_config")
    hidden = _count(texts.get("hidden_size") or config.get("hidden_size"))
    if not vision or hidden is None:
        raise ModelUnknown(
            f"{name} has no vision_config and hidden_size in its config.json; a plan needs a model for pictures"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or texts.get("dtype") or "bfloat16")
    levels = vision.get("deepstack_visual_indexes")
    widths = 1 + (len(levels) if isinstance(levels, list) else 0)
    return Model(
        name, hidden * widths * VALUE_BYTES.get(dtype.removeprefix("torch."), 2), _rule(vision, config, processor)
    )


def _rule(vision: Mapping[str, Any], config: Mapping[str, Any], processor: Mapping[str, Any]) -> GridRule | None:
    patch = _count(processor.get("patch_size") or vision.get("patch_size"))
    merge = _count(processor.get("merge_size") or vision.get("spatial_merge_size"))
    if patch is None or merge is None:
        return None
    size, family = _section(processor, "size"), str(config.get("model_type"))
    known = LIMITS.get(family, (None, None))
    least = _count(processor.get("min_pixels") or size.get("shortest_edge")) or known[0]
    most = _count(processor.get("max_pixels") or size.get("longest_edge")) or known[1]
    if least is None or most is None:
        return None
    return GridRule("image_grid_thw", patch, patch * merge, least, most)


def _section(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 40 else None
