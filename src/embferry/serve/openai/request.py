"""Requests for ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from embferry.protocol.text import shown
from embferry.serve.config_values import plain_words
from embferry.serve.errors import ServeError
from embferry.serve.openai.fields import note_ignored, refuse_unsupported
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.sampling import MAX_TOP_LOGPROBS, Count, SamplingFields, StreamOptions, Whole

R = TypeVar("R", bound=SamplingFields)


class ChatRequest(SamplingFields):
    """The fields that work. :mod:`.messages` parses ``messages``, :mod:`.constraints` what the answer must match."""

    messages: Annotated[list[Any], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template(self) -> dict[str, bool]:
        """The fields that say how the prompt ends, as language workers know them."""
        continues = bool(self.continue_final_message)
        opens = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        return ({"continues": True} if continues else {}) | ({} if opens or continues else {"opens": False})


def parse(body: dict[str, Any], ignored: Ignored | None = None) -> ChatRequest:
    """Validates a request.

    Args:
        body: the decoded JSON object.
        ignored: gets the fields that have no effect.

    Raises:
        ServeError: invalid_request or unsupported_value with the field in ``param``.
    """
    request = validated(ChatRequest, body, Ignored() if ignored is None else ignored)
    if request.top_logprobs and not request.logprobs:
        raise ServeError("invalid_request", "top_logprobs needs logprobs: true", param="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        why = "continue_final_message and add_generation_prompt exclude each other"
        raise ServeError("invalid_request", why, param="continue_final_message")
    return request


def validated(kind: type[R], body: dict[str, Any], ignored: Ignored) -> R:
    """Validates the fields of a request of any kind.

    Raises:
        ServeError: invalid_request or unsupported_value with the field in ``param``.
    """
    refuse_unsupported(body)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = _path(first["loc"], {*kind.model_fields, *StreamOptions.model_fields})
        told = f"{shown(first['input'], 80)}: {plain_words(first['msg'])}"
        problem = "is missing" if first["type"] == "missing" else told
        raise ServeError("invalid_request", f"{param}: {problem}", param=param) from error
    if body.get("stream_options") is not None and not request.stream:
        why = "stream_options is for requests with stream: true"
        raise ServeError("invalid_request", why, param="stream_options")
    if isinstance(options := body.get("stream_options"), dict) and options.get("continuous_usage_stats"):
        at = "stream_options.continuous_usage_stats"
        raise ServeError("unsupported_value", f"{at} is not supported; use include_usage", param=at)
    note_ignored(body, kind.model_fields, ignored)
    return request


def _path(loc: tuple[int | str, ...], fields: set[str]) -> str:
    """Writes ``("stop", 1)`` as ``stop[1]``, without the names of types that pydantic adds for unions."""
    names = [part for part in loc if isinstance(part, int) or part in fields]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).removeprefix(".")
