"""The list of models of an instance, checked: pure."""

from __future__ import annotations

from typing import Any


def models_of(body: Any) -> dict[str, dict[str, Any]]:
    """Returns the model objects of ``/v1/models`` by name. Raises ValueError if there is none."""
    try:
        models = {str(model["id"]): dict(model) for model in body["data"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("/v1/models has no list of models; is this vllm serve?") from error
    if not models:
        raise ValueError("/v1/models lists no model")
    return models
