"""Whose buffers are where: the registrations that a sender has taken."""

from __future__ import annotations

from collections.abc import Callable

from .commands import Command, Refused, Registered
from .frames import EmbeddingArgsRegisterInfo

MAX_SESSIONS = 4096


class Sessions:
    """Registrations by session id, bounded.

    One is never exchanged under a room that uses it: its tokens would go to addresses that mean something else. A
    different registration waits until those rooms are over; until then the session may ask for nothing new.

    :param in_use: the sessions that live rooms have among their destinations.
    """

    def __init__(self, in_use: Callable[[], set[str]]) -> None:
        self._in_use = in_use
        self._known: dict[str, EmbeddingArgsRegisterInfo] = {}
        self._waiting: dict[str, EmbeddingArgsRegisterInfo] = {}

    def register(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        session = info.mooncake_session_id
        known = self._known.get(session)
        if known == info:
            self._waiting.pop(session, None)
            return [Refused("registered already, with the same buffers", session=session)]
        if known is not None and session in self._in_use():
            self._waiting[session] = info
            return [Refused("registered already, with other buffers that a transfer uses", session=session)]
        if known is None and len(self._known) >= MAX_SESSIONS and not self._forget_one():
            return [Refused(f"{MAX_SESSIONS} sessions are registered and in use", session=session)]
        return self._take(info)

    def pointers(self, session: str) -> tuple[int, ...]:
        """:raises KeyError: not registered."""
        return self._known[session].dst_embedding_ptrs

    def obstacle(self, session: str) -> str:
        """Why this session may not ask for a transfer now; empty if it may."""
        if session not in self._known:
            return "the session is not registered"
        if session in self._waiting:
            return "the session has registered other buffers while a transfer uses the earlier ones"
        return ""

    def released(self, session: str) -> list[Command]:
        """A room of this session is over: what waited for it is taken now."""
        if session not in self._waiting or session in self._in_use():
            return []
        return self._take(self._waiting.pop(session))

    def _take(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        session = info.mooncake_session_id
        self._known.pop(session, None)  # the newest stands last
        self._known[session] = info
        return [Registered(session, info.dst_embedding_ptrs)]

    def _forget_one(self) -> bool:
        """Forgets the oldest registration that no room uses."""
        in_use = self._in_use()
        oldest = next((session for session in self._known if session not in in_use), None)
        if oldest is not None:
            del self._known[oldest]
        return oldest is not None
