"""A bound on the bytes that the requests of a process hold together."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType

from embferry.serve.errors import ServeError


class ByteBudget:
    """Counts the bytes that requests hold, and refuses what goes beyond the limit. Thread-safe.

    A request that is alone is not refused, however large it is: waiting would not help it. Likewise one that is its
    client's only one is not refused by the limit of one client.

    Args:
        limit: bytes.
        setting: the name of the setting, for errors.
        client_limit: bytes of one client; None: as much as all.
        client_setting: the name of that setting.
    """

    def __init__(self, limit: int, setting: str, client_limit: int | None = None, client_setting: str = "") -> None:
        self.limit = limit
        self.client_limit = limit if client_limit is None else client_limit
        self._setting, self._client_setting = setting, client_setting
        self._lock = threading.Lock()
        self._held = 0
        self._by_client: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """The bytes that all requests hold now."""
        return self._held

    def hold(self, nbytes: int = 0, *, client: str = "") -> Hold:
        """Returns the share of a new request. :meth:`Hold.release` must follow.

        Args:
            nbytes: of the request.
            client: whose request it is.

        Raises:
            ServeError: capacity_exhausted.
        """
        hold = Hold(self, client)
        hold.set(nbytes)
        return hold

    def _resize(self, client: str, old: int, new: int) -> None:
        with self._lock:
            others, its_others = self._held - old, self._by_client[client] - old
            if new > old and others > 0 and others + new > self.limit:
                raise _full("other requests hold", others, new, self.limit, self._setting)
            if new > old and its_others > 0 and its_others + new > self.client_limit:
                why = "other requests of this client hold"
                raise _full(why, its_others, new, self.client_limit, self._client_setting)
            self._held = others + new
            self._by_client[client] = its_others + new
            if not self._by_client[client]:
                del self._by_client[client]


def _full(who: str, others: int, new: int, limit: int, setting: str) -> ServeError:
    why = f"{who} {others:,} bytes and this one needs {new:,}; at most {limit:,} fit ({setting}); try again later"
    return ServeError("capacity_exhausted", why, status=503, retryable=True)


class Hold:
    """The share of one request. A context manager, which releases it.

    Attributes:
        nbytes: the share.
        peak: the most that it has been.
    """

    def __init__(self, budget: ByteBudget, client: str = "") -> None:
        self._budget, self._client = budget, client
        self._lock = threading.Lock()
        self._released = False
        self.nbytes = self.peak = 0

    def set(self, nbytes: int) -> None:
        """Changes the share to ``nbytes``. Does nothing once it is released.

        Raises:
            ServeError: capacity_exhausted, if it grows and the others leave no room; it is unchanged then.
        """
        with self._lock:
            if not self._released:
                self._budget._resize(self._client, self.nbytes, nbytes)
                self._changed(nbytes)

    def add(self, nbytes: int) -> None:
        """Adds to the share; see :meth:`set`."""
        with self._lock:
            if not self._released:
                self._budget._resize(self._client, self.nbytes, self.nbytes + nbytes)
                self._changed(self.nbytes + nbytes)

    def _changed(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.peak = max(self.peak, nbytes)

    @contextlib.contextmanager
    def passing(self) -> Iterator[Callable[[int], None]]:
        """Yields :meth:`add`, and takes off what was added by it at the end."""
        added = 0

        def add(nbytes: int) -> None:
            nonlocal added
            self.add(nbytes)
            added += nbytes

        try:
            yield add
        finally:
            self.add(-added)

    def release(self) -> None:
        """Gives the share back. Idempotent."""
        with self._lock:
            self._budget._resize(self._client, self.nbytes, 0)
            self.nbytes, self._released = 0, True

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
