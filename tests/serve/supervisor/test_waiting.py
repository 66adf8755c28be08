"""Lines of a cluster that is not ready yet."""

from __future__ import annotations

import pytest

from embferry.serve.supervisor import cluster as module
from embferry.serve.supervisor.cluster import PROGRESS_SECONDS
from embferry.serve.supervisor.process import ClusterError
from tests.serve.supervisor.test_stop import Stub


def test_what_is_missing_is_told_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    stub = Stub([], [], 10)
    stub._progress = said.append
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def missing() -> str:
        now[0] += 0.6 * PROGRESS_SECONDS
        return "no answer yet from encode-0"

    monkeypatch.setattr(stub, "_missing", missing)
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    with pytest.raises(ClusterError, match=r"not ready within 20 s: no answer yet from encode-0"):
        stub.wait_ready(20)
    assert said == [
        "waiting, 6 of 20 s: no answer yet from encode-0",
        "waiting, 12 of 20 s: no answer yet from encode-0",
        "waiting, 18 of 20 s: no answer yet from encode-0",
    ]
