"""The embedding that each sender session has announced to one receiver: always the same one."""

from __future__ import annotations

from . import guards
from .errors import RemoteProtocolError
from .messages import Offer

MAX_SENDERS = 64
"""Sessions that are remembered; the oldest are forgotten."""

Announcement = tuple[int, bytes, tuple[int, ...]]
"""Length, digest and aux."""


class Announcements:
    """The announcements, by session."""

    def __init__(self) -> None:
        self._said: dict[int, Announcement] = {}

    def __len__(self) -> int:
        return len(self._said)

    def add(self, source: int, offer: Offer) -> None:
        """Takes an offer of session ``source``. One without a length announces nothing: it may be late.

        Raises:
            RemoteProtocolError: The session has announced something else before.
        """
        if offer.total_tokens < 0:
            return
        now = (offer.total_tokens, offer.content_digest, offer.aux)
        before = self._said.get(source)
        if not guards.same_announcement(before, now):
            assert before is not None
            raise RemoteProtocolError(f"the encode side has announced {_words(before)}, and now {_words(now)}")
        self._said[source] = now
        if len(self._said) > MAX_SENDERS:
            del self._said[next(iter(self._said))]


def _words(announcement: Announcement) -> str:
    total, digest, aux = announcement
    return f"{total} tokens with digest {digest.hex()} and aux {list(aux)}"
