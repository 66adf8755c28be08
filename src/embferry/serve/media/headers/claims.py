"""The error of a header that claims too much."""

from __future__ import annotations


class ClaimError(ValueError):
    """A header claims more than the file can hold, or more than is decoded here. The text says what.

    Attributes:
        truncated: the file may be the beginning of a sound one.
    """

    def __init__(self, text: str, *, truncated: bool = False) -> None:
        super().__init__(text)
        self.truncated = truncated
