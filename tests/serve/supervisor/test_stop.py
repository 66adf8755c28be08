"""The end of a cluster: one deadline for all processes, with a share kept for those that end last."""

from __future__ import annotations

from typing import Any

import pytest

from embferry.serve.config import ServeSettings, Settings
from embferry.serve.supervisor import cluster as module
from embferry.serve.supervisor.cluster import LAST_SHARE, Cluster

BEGAN = 1000.0


class Deaf:
    """A process that ends only when it is killed, at its deadline. It moves the clock to there."""

    failure = None

    def __init__(self, name: str, ends: list[tuple[str, float]], clock: list[float]) -> None:
        self.first_url = self.name = name
        self._ends, self._clock = ends, clock

    def stop(self, seconds: float | None = None) -> None:
        self._ends.append((f"stop {self.name}", self._clock[0]))

    def join(self, deadline: float) -> None:
        self._clock[0] = max(self._clock[0], deadline)
        self._ends.append((f"end {self.name}", self._clock[0]))


class Stub(Cluster):
    processes = ()

    def __init__(self, first: list[Any], others: list[Any], seconds: float) -> None:
        super().__init__(Settings(serve=ServeSettings(stop_timeout=seconds)), {}, (1, ""))
        self._first, self._others = first, others

    def first(self) -> list[Any]:
        return []

    def others(self) -> list[Any]:
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [BEGAN]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_processes_that_do_not_end_share_one_stop_timeout(clock: list[float]) -> None:
    ends: list[tuple[str, float]] = []
    router, worker, bootstrap = (Deaf(name, ends, clock) for name in ("router", "worker", "bootstrap"))
    Stub([bootstrap], [router, worker], 10).stop()
    killed = BEGAN + 10 * (1 - LAST_SHARE)
    assert ends == [
        ("stop router", BEGAN), ("stop worker", BEGAN), ("end router", killed), ("end worker", killed),
        ("stop bootstrap", killed), ("end bootstrap", BEGAN + 10),
    ]  # fmt: skip


@pytest.mark.parametrize("at", ["router", "worker", "bootstrap"])
def test_an_interrupt_during_the_end_kills_all_and_waits_for_their_end(at: str, clock: list[float]) -> None:
    ends: list[tuple[str, float]] = []

    class Interrupted(Deaf):
        is_first = True

        def join(self, deadline: float) -> None:
            if self.name == at and self.is_first:
                self.is_first = False
                raise KeyboardInterrupt
            if f"kill {self.name}" not in dict(ends):
                super().join(deadline)
            else:
                ends.append((f"gone {self.name}", self._clock[0]))

        def kill(self) -> None:
            ends.append((f"kill {self.name}", self._clock[0]))

    router, worker, bootstrap = (Interrupted(name, ends, clock) for name in ("router", "worker", "bootstrap"))
    with pytest.raises(KeyboardInterrupt):
        Stub([bootstrap], [router, worker], 10).stop()
    did = [what for what, _ in ends]
    kills = [f"kill {name}" for name in ("bootstrap", "router", "worker")]
    assert [what for what in did if what.startswith("kill")] == kills
    assert did[-3:] == [f"gone {name}" for name in ("bootstrap", "router", "worker")]


def test_without_processes_that_end_last_the_others_have_all_of_the_time(clock: list[float]) -> None:
    ends: list[tuple[str, float]] = []
    Stub([], [Deaf("worker", ends, clock)], 10).stop()
    assert ends[-1] == ("end worker", BEGAN + 10)


def test_an_interrupt_while_processes_are_started_ends_those_that_run(clock: list[float]) -> None:
    ends: list[tuple[str, float]] = []

    class Cut(Stub):
        def start(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Cut([], [Deaf("worker", ends, clock)], 10):
        pytest.fail("it was started")
    assert ends[-1] == ("end worker", BEGAN + 10)
