"""The base of all sections of the settings, and kinds of values that many of them have."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, and values do not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # a misspelt key may stand before a secret, and Ray shows the message
    )
