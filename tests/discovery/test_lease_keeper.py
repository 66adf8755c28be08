"""The thread of a lease keeper with a scripted client instead of sockets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from embferry.discovery.bootstrap_client import Lease, LeaseKeeper
from embferry.discovery.leases import Worker
from embferry.protocol.errors import LocalProtocolError, TransportError

WORKER = Worker(id="w1", role="encode")
DEADLINE_S = 60.0


class ScriptedClient:
    """A client whose renewals return or raise the steps of a script; the last step repeats."""

    url = "http://scripted"

    def __init__(self, *script: Lease | Exception) -> None:
        self._script = list(script)
        self._changed = threading.Condition()
        self.renewed: list[Worker] = []
        self.removed: list[str] = []
        self.remove_error: Exception | None = None

    def register(self, worker: Worker) -> Lease:
        with self._changed:
            self.renewed.append(worker)
            self._changed.notify_all()
            step = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(step, Exception):
            raise step
        return step

    def remove(self, worker_id: str) -> bool:
        self.removed.append(worker_id)
        if self.remove_error is not None:
            raise self.remove_error
        return True

    def wait_for(self, renewals: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.renewed) >= renewals, DEADLINE_S)


Start = Callable[..., LeaseKeeper]
NEW, KNOWN = Lease(lease_seconds=0.03, new=True), Lease(lease_seconds=0.03, new=False)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr("embferry.discovery.bootstrap_client.RETRY_SECONDS", 0.01)
    keepers: list[LeaseKeeper] = []

    def begin(client: ScriptedClient, load: Callable[[], float] = lambda: 0.0) -> LeaseKeeper:
        keeper = LeaseKeeper(client, WORKER, load)  # type: ignore[arg-type]  # a double, not a subclass
        keepers.append(keeper)
        keeper.start()
        return keeper

    yield begin
    for keeper in keepers:
        keeper.stop()


def test_every_renewal_reports_the_current_load(start):
    loads = iter(range(1000))
    client = ScriptedClient(NEW, KNOWN)
    keeper = start(client, lambda: float(next(loads)))
    client.wait_for(4)
    assert keeper.wait_registered(DEADLINE_S)
    keeper.stop()
    assert [w.load for w in client.renewed[:4]] == [0, 1, 2, 3]
    assert client.removed == ["w1"]


def test_an_outage_is_survived_with_one_warning(start, caplog):
    caplog.set_level(logging.INFO, "embferry.discovery.bootstrap_client")
    away = TransportError("connection refused")
    client = ScriptedClient(NEW, away, away, away, NEW, KNOWN)
    start(client)
    client.wait_for(6)
    messages = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in messages].count("WARNING") == 1
    assert any(level == "INFO" and "again" in text for level, text in messages)


@pytest.mark.parametrize("error", [TransportError("not yet"), LocalProtocolError("refused")])
def test_a_failed_registration_is_repeated(start, error):
    client = ScriptedClient(error, error, NEW)
    keeper = start(client)
    assert keeper.wait_registered(DEADLINE_S)


def test_a_keeper_that_never_registered_removes_nothing(start):
    client = ScriptedClient(TransportError("connection refused"))
    keeper = start(client)
    client.wait_for(2)
    keeper.stop()
    keeper.stop()
    assert not keeper.wait_registered(0)
    assert client.removed == []


def test_stopping_does_not_wait_for_the_lease_and_survives_a_failed_removal(start):
    client = ScriptedClient(Lease(lease_seconds=3600, new=True))
    client.remove_error = TransportError("gone already")
    keeper = start(client)
    assert keeper.wait_registered(DEADLINE_S)
    keeper.stop()  # the next renewal is 20 minutes away: waiting for it would exceed the test's time-out
    assert client.removed == ["w1"]
    assert not [t for t in threading.enumerate() if t.name == "lease w1"]
