"""Turns tokens into text during generation: emits whole characters only, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Decoders write this character for bytes that are not a whole character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes a growing list of tokens. All pieces joined equal the result of decoding all tokens at once."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self._ids: list[int] = []
        # Decoding starts a few tokens back, at the last but one place where a character ended, because the first token
        # of a text can decode differently from the same token further on: some tokenizers drop its leading space.
        self._anchor = 0
        self._settled = 0
        self._given = 0

    def push(self, token: int) -> str:
        """Returns the text that became final with this token; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._anchor)
        whole = text.removesuffix(REPLACEMENT)
        delta = whole[self._given :]
        self._given = max(self._given, len(whole))
        if whole == text:
            self._anchor, self._settled = self._settled, len(self._ids)
            self._given = len(self._decode(self._anchor))
        return delta

    def finish(self) -> str:
        """Returns the remaining text: a replacement character if the last character is incomplete."""
        return self._decode(self._anchor)[self._given :]

    def _decode(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], **self._options))


class StopText:
    """Passes text on until a stop string appears, and withholds all after it.

    Args:
        stops: The stop strings.
        include: Whether the stop string itself is passed on.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Returns the text that is final now; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            at, length = min(found)
            return text[: at + length] if self._include else text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def pass_on(self, text: str) -> str:
        """Returns the text without a look for stop strings."""
        return self.finish() + text

    def finish(self) -> str:
        """Returns the text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
