"""The registrations that a sender knows: where the buffers of each session are."""

from __future__ import annotations

from collections.abc import Callable

from .commands import Command, Refused, Registered
from .requests import EmbeddingArgsRegisterInfo

MAX_SESSIONS = 4096


class Registrations:
    """Registrations by session id, of bounded number.

    A registration is never replaced while a room uses it, because tokens would go to addresses that mean something
    else. A different registration waits until those rooms are over, and until then the session may request nothing new.

    Args:
        in_use: Returns the sessions that the live rooms have among their destinations.
    """

    def __init__(self, in_use: Callable[[], set[str]]) -> None:
        self._in_use = in_use
        self._known: dict[str, EmbeddingArgsRegisterInfo] = {}
        self._waiting: dict[str, EmbeddingArgsRegisterInfo] = {}

    def register(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        """Accepts a registration, keeps it until its session is idle, or refuses it."""
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
        return self._accept(info)

    def pointers(self, session: str) -> tuple[int, ...]:
        """Returns the base pointers of a registered session."""
        return self._known[session].dst_embedding_ptrs

    def obstacle(self, session: str) -> str:
        """Returns why this session may not request a transfer now; an empty string if it may."""
        if session not in self._known:
            return "the session is not registered"
        if session in self._waiting:
            return "the session has registered other buffers while a transfer uses the earlier ones"
        return ""

    def released(self, session: str) -> list[Command]:
        """Accepts the waiting registration of a session, one of whose rooms has ended, if no other room uses it."""
        if session not in self._waiting or session in self._in_use():
            return []
        return self._accept(self._waiting.pop(session))

    def _accept(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        session = info.mooncake_session_id
        self._known.pop(session, None)  # the newest stands last
        self._known[session] = info
        return [Registered(session, info.dst_embedding_ptrs)]

    def _forget_one(self) -> bool:
        """Forgets the oldest registration that no room uses. Returns whether there was one."""
        in_use = self._in_use()
        oldest = next((session for session in self._known if session not in in_use), None)
        if oldest is not None:
            del self._known[oldest]
        return oldest is not None
