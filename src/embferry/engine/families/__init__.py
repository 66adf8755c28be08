"""Model families by the ``model_type`` of their configuration. A new family is one file here and one line below."""

from __future__ import annotations

import importlib
from typing import Any

from embferry.engine.errors import UnsupportedModel
from embferry.engine.families.base import Family

#: Imported on first use, because importing a modelling module of transformers takes a second.
SUPPORTED: dict[str, str] = {
    "qwen2_vl": "embferry.engine.families.qwen2_vl",
    "qwen2_5_vl": "embferry.engine.families.qwen2_5_vl",
    "qwen3_vl": "embferry.engine.families.qwen3_vl",
}


def family_of(config: Any) -> Family:
    """Returns the adapter for a model's configuration.

    Raises:
        UnsupportedModel: There is no adapter; the message lists the supported families.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED:
        raise UnsupportedModel(f"no adapter for models of type {model_type!r}; supported are {', '.join(SUPPORTED)}")
    family = importlib.import_module(SUPPORTED[model_type]).FAMILY
    if not isinstance(family, Family):
        raise UnsupportedModel(f"{SUPPORTED[model_type]} does not define a Family named FAMILY")
    return family


__all__ = ["SUPPORTED", "Family", "family_of"]
