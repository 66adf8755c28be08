"""Model families by the ``model_type`` of their configuration. Each is a file of that name, and named in SUPPORTED."""

from __future__ import annotations

import importlib
from typing import Any

from embferry.engine.errors import UnsupportedModel
from embferry.engine.families.base import Family
from embferry.models.checkpoints import SUPPORTED


def family_of(config: Any) -> Family:
    """Returns the adapter for a model's configuration.

    Raises:
        UnsupportedModel: There is no adapter; the message lists the supported families.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED:
        raise UnsupportedModel(f"{model_type} is not supported; {', '.join(SUPPORTED)} are")
    # Imported on first use, because importing a modelling module of transformers takes a second.
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
