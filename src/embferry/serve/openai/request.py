"""Requests for ``/v1/chat/completions``.

Unknown fields are ignored, as between OpenAI's servers and clients. A known field with an unsupported value is refused,
because ignoring it would change the answer silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError

Count = Annotated[int, Field(ge=1, strict=True)]
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(max_length=4),
]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The supported fields. :mod:`.messages` parses ``messages``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[Any], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63, strict=True)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, default_max_tokens: int) -> dict[str, Any]:
        """Returns the field ``sampling`` for the language worker. Without a temperature, sampling is greedy."""
        return {
            "max_tokens": self.max_completion_tokens or self.max_tokens or default_max_tokens,
            "temperature": 0.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
            "stop": list(self.stop or ()),
        }


def _empty(value: Any) -> bool:
    return not value


_SUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda v: v == 1, "one choice per request"),
    "tools": (_empty, "no tools"),
    "functions": (_empty, "no functions"),
    "tool_choice": (lambda v: v in ("none", "auto"), "no tools"),
    "function_call": (lambda v: v in ("none", "auto"), "no functions"),
    "response_format": (lambda v: isinstance(v, dict) and v.get("type") == "text", "text only"),
    "modalities": (lambda v: v == ["text"], "text only"),
    "audio": (_empty, "text only"),
    "logprobs": (_empty, "no log probabilities"),
    "top_logprobs": (_empty, "no log probabilities"),
    "logit_bias": (_empty, "no bias"),
    "frequency_penalty": (_empty, "no penalties"),
    "presence_penalty": (_empty, "no penalties"),
    "prediction": (_empty, "no predicted output"),
}
"""Restricted fields: a test for supported values, and a short text on what is supported. Null is always supported."""


def parse(body: dict[str, Any]) -> ChatRequest:
    """Validates a request.

    Args:
        body: the decoded JSON object.

    Raises:
        ServeError: invalid_request or unsupported_value with the field in ``param``.
    """
    for name, (is_supported, supported) in _SUPPORTED.items():
        value = body.get(name)
        if value is not None and not is_supported(value):
            raise ServeError(
                "unsupported_value", f"{name}={shown(value, 80)} is not supported ({supported})", param=name
            )
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = _path(first["loc"])
        problem = "is missing" if first["type"] == "missing" else f"{shown(first['input'], 80)}: {first['msg']}"
        raise ServeError("invalid_request", f"{param}: {problem}", param=param) from error


def _path(loc: tuple[int | str, ...]) -> str:
    """Writes ``("stop", 1)`` as ``stop[1]``, without the names of types that pydantic adds for unions."""
    names = [part for part in loc if isinstance(part, int) or part in _FIELDS]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).removeprefix(".")


_FIELDS = {*ChatRequest.model_fields, *StreamOptions.model_fields}
