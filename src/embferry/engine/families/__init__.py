"""Model families by the ``model_type`` of their configuration. A new family is a file of that name and an entry."""

from __future__ import annotations

import importlib
from typing import Any

from embferry.engine.errors import UnsupportedModel
from embferry.engine.families.base import Family

#: Imported on first use, because importing a modelling module of transformers takes a second.
SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def family_of(config: Any) -> Family:
    """Returns the adapter for a model's configuration.

    Raises:
        UnsupportedModel: There is no adapter; the message lists the supported families.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED:
        raise UnsupportedModel(f"no adapter for models of type {model_type!r}; supported are {', '.join(SUPPORTED)}")
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
