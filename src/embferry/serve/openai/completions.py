"""``/v1/completions``: a prompt without a chat template, and replies in the form of that path."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from embferry.serve.errors import ServeError
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.reply import Answer, Choice, Form, logprob_entry
from embferry.serve.openai.request import validated
from embferry.serve.openai.sampling import MAX_TOP_LOGPROBS, Count, SamplingFields, Whole

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's, at this path."""
MAX_PROMPT_TOKENS = 1 << 20
"""Ids of tokens in a prompt."""


class CompletionRequest(SamplingFields):
    """The fields that work."""

    prompt: Any = None
    max_tokens: Count | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt: a text or ids of tokens.

        Raises:
            ServeError: invalid_request, unsupported_value.
        """
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
            if len(prompt) > 1:
                why = f"prompt has {len(prompt)} prompts; send one in each request"
                raise ServeError("unsupported_value", why, param="prompt")
            prompt = prompt[0]
        if isinstance(prompt, str) and prompt:
            return prompt
        return as_tokens(prompt, "prompt")


def as_tokens(value: Any, name: str) -> list[int]:
    """Returns a list of ids of tokens.

    Raises:
        ServeError: invalid_request; context_length_exceeded.
    """
    if not (isinstance(value, list) and value and all(map(_is_token, value))):
        why = f"{name} must be a list of ids of tokens, not empty{', or a text' if name == 'prompt' else ''}"
        raise ServeError("invalid_request", why, param=name)
    if len(value) > MAX_PROMPT_TOKENS:
        why = f"{name} has {len(value):,} tokens; at most {MAX_PROMPT_TOKENS:,} are read"
        raise ServeError("context_length_exceeded", why, param=name, status=400)
    return value


def parse_completion(body: dict[str, Any], ignored: Ignored) -> CompletionRequest:
    """Validates a request.

    Raises:
        ServeError: invalid_request or unsupported_value with the field in ``param``.
    """
    return validated(CompletionRequest, body, ignored)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


class CompletionForm(Form):
    """Replies of ``/v1/completions``.

    Args:
        model: the model's name.
        has_usage: whether a stream ends with the numbers of tokens.
    """

    def __init__(self, model: str, has_usage: bool = False) -> None:
        self._has_usage = has_usage
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def opening(self) -> Iterable[dict[str, Any]]:
        return ()

    def token(self, told: dict[str, Any]) -> Iterable[dict[str, Any]]:
        number = told.get("choice", 0)
        offset = self._offsets.get(number, 0)
        logprobs = [logprob_entry(told)] if "logprob" in told else []
        self._offsets[number] = offset + len(told.get("piece", ""))
        if told["text"] or logprobs:
            yield self._chunk(number, told["text"], None, _logprobs(logprobs, offset))

    def closing(self, answer: Answer, extension: dict[str, Any]) -> Iterable[dict[str, Any]]:
        last = len(answer.choices) - 1
        for number, choice in enumerate(answer.choices):
            chunk = self._chunk(number, "", choice.finish_reason, None)
            yield chunk | ({"embferry": extension} if number == last else {})
        if self._has_usage:
            yield {**self._head, "choices": [], "usage": answer.end["usage"]}

    def whole(self, answer: Answer, extension: dict[str, Any]) -> dict[str, Any]:
        choices = [_choice(number, choice) for number, choice in enumerate(answer.choices)]
        return {**self._head, "choices": choices, "usage": answer.end["usage"], "embferry": extension}

    def _chunk(self, number: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [{"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}],
        }


def _choice(number: int, choice: Choice) -> dict[str, Any]:
    return {
        "index": number,
        "text": "".join(choice.text),
        "logprobs": _logprobs(choice.logprobs, 0),
        "finish_reason": choice.finish_reason,
    }


def _logprobs(entries: list[dict[str, Any]], offset: int) -> dict[str, Any] | None:
    """Returns the four lists that this path has in place of a list of entries."""
    if not entries:
        return None
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }
