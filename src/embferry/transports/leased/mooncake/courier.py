"""The thread that drives one engine of a sender."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from embferry.protocol.errors import TransportError

from .flights import Cargo, Flights

log = logging.getLogger(__name__)

LIVENESS_CHECK_S = 1.0


class Courier:
    """Carries cargo until it is told to :meth:`quit`, then ends its engine, and with it what is under way.

    :param open_flights: gets whom to tell of a cargo that is over; runs on the thread.
    :param on_carried: a cargo is over.
    :param on_broken: the engine cannot be started, or is stuck.
    :param on_end: the engine has ended, so the memory of no cargo is read any more. Called once, last.
    """

    def __init__(
        self,
        open_flights: Callable[[Callable[[Cargo], None]], Flights],
        on_carried: Callable[[Cargo], None],
        on_broken: Callable[[TransportError], None],
        on_end: Callable[[], None],
    ) -> None:
        self._open_flights = open_flights
        self._on_carried, self._on_broken, self._on_end = on_carried, on_broken, on_end
        self._changed = threading.Condition()  # guards what follows
        self._arrived: deque[Cargo] = deque()
        self._dropped: set[int] = set()
        self._quit = False
        self._thread = threading.Thread(target=self._run, name="embferry-mooncake-courier", daemon=False)

    def start(self) -> None:
        self._thread.start()

    def carry(self, cargo: Cargo) -> None:
        with self._changed:
            self._arrived.append(cargo)
            self._changed.notify()

    def drop(self, epoch: int) -> None:
        """Begins nothing more of what has arrived under ``epoch``."""
        with self._changed:
            self._dropped.add(epoch)
            self._changed.notify()

    def quit(self) -> None:
        with self._changed:
            self._quit = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            flights = self._open_flights(self._on_carried)
            try:
                self._work(flights)
            finally:
                flights.close()
        except TransportError as error:
            self._on_broken(error)
        except Exception as error:  # a bug; converted, so that nobody waits in vain
            log.exception("the thread %s has ended", threading.current_thread().name)
            self._on_broken(TransportError(f"the sending thread ended with {error!r}; report this as a bug"))
        self._on_end()

    def _work(self, flights: Flights) -> None:
        wait = None
        while True:
            with self._changed:
                if not (self._arrived or self._dropped or self._quit) and wait != 0.0:
                    self._changed.wait(LIVENESS_CHECK_S if wait is None else wait)
                # A program that ends without closing its transport must end all the same.
                if self._quit or not threading.main_thread().is_alive():
                    return
                arrived, self._arrived = self._arrived, deque()
                dropped, self._dropped = self._dropped, set()
            for cargo in arrived:
                flights.load(cargo)
            flights.drop(dropped)
            wait = 0.0 if flights.advance() else flights.pause()
