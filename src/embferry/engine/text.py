"""Tokens → text while they are being generated: whole characters only, nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What a decoder writes for bytes that are not a whole character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes a growing list of tokens. What it gives out, put together, is what decoding all of them at once gives."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding starts a few tokens back, at the last but one place where a character ended: the first token of a
        # text can be written otherwise than the same token further on (some tokenizers drop its leading space).
        self._anchor = 0
        self._settled = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
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
        """What is left: a replacement character if the last one never became whole."""
        return self._decode(self._anchor)[self._given :]

    def _decode(self, start: int) -> str:
        ids = self._ids[start:]
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopText:
    """Passes text on until one of the stop strings appears in it, and nothing of the stop string itself."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be given out now. After a stop string was found, nothing."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and became no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
