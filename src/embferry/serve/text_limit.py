"""The limit on the texts of a request, which is checked before they are tokenized."""

from __future__ import annotations

from typing import Any

from embferry.serve.config import CHARACTERS_PER_TOKEN, LanguageSettings
from embferry.serve.errors import ServeError


def check_characters(count: int, limits: LanguageSettings, model_tokens: int | None = None) -> None:
    """Checks the number of characters of all texts of a request.

    Args:
        count: the number.
        limits: the settings.
        model_tokens: the most tokens that the model takes, if they are known.

    Raises:
        ServeError: context_length_exceeded.
    """
    most = limits.prompt_characters
    if model_tokens is not None and limits.max_prompt_characters is None:
        most = min(most, CHARACTERS_PER_TOKEN * model_tokens)
    if count > most:
        limit = f"{most:,} (language.max_prompt_characters)"
        why = f"the texts of the request have {count:,} characters; the limit is {limit}"
        raise ServeError("context_length_exceeded", why, param="messages", status=400)


def count_characters(value: Any) -> int:
    """Returns the number of characters of all strings in a JSON value, names of fields included."""
    count, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            count += len(one)
        elif isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
    return count
