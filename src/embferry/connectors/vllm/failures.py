"""Requests that cannot run: the router is told why before vLLM fails them, for vLLM's answer has no place for it."""

from __future__ import annotations

import time
from concurrent.futures import Future

from embferry.protocol.errors import EmbeddingTransferError

from .router import Router
from .tally import Tally

TELL_S = 0.5
"""How long a request that fails waits for the router to have taken the reason in."""


class Failures:
    """:param router: None: there is nobody to tell."""

    def __init__(self, router: Router | None, tally: Tally) -> None:
        self._router, self._tally = router, tally
        self._known: set[str] = set()
        self._telling: dict[str, tuple[Future[None] | None, float]] = {}

    def add(self, request: str, error: EmbeddingTransferError, token: str | None) -> None:
        """``token``: of the embedding that cannot be had, for the router."""
        if request in self._known:
            return
        self._known.add(request)
        self._tally.add("requests_failed")
        told = None if self._router is None or token is None else self._router.failed(token, error)
        self._telling[request] = (told, time.monotonic() + TELL_S)

    def __contains__(self, request: str) -> bool:
        return request in self._known

    def take(self) -> set[str]:
        """Those that are to fail now. Each is taken once."""
        now = time.monotonic()
        due = {name for name, (told, until) in self._telling.items() if told is None or told.done() or now >= until}
        for name in due:
            del self._telling[name]
        return due

    def forget(self, request: str) -> None:
        """It has finished."""
        self._known.discard(request)
        self._telling.pop(request, None)
