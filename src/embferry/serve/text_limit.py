"""The limit on the texts of a request, which is checked before they are tokenized."""

from __future__ import annotations

from embferry.serve.config import LanguageSettings
from embferry.serve.errors import ServeError


def check_characters(count: int, limits: LanguageSettings) -> None:
    """Raises ServeError context_length_exceeded if the texts of a request have too many characters."""
    if count > limits.prompt_characters:
        limit = f"{limits.prompt_characters:,} (language.max_prompt_characters)"
        why = f"the texts of the request have {count:,} characters; the limit is {limit}"
        raise ServeError("context_length_exceeded", why, param="messages", status=400)
