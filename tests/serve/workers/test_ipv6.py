"""A cluster on IPv6 alone, with a key and TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.serve.config import SecuritySettings
from embferry.serve.supervisor import LocalCluster
from embferry.trust.keys import Key
from embferry.trust.tls import dialling_with
from embferry.trust.trust import TLS_ENV
from tests.serve.workers.test_processes import SETTINGS
from tests.serve.workers.test_tls import ask
from tests.strangers.kernel import listening_of
from tests.trust.authority import Authority

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


@pytest.mark.parametrize("transport", ["shm", "tcp", "http"])
def test_a_question_is_answered_over_ipv6(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority.make(tmp_path / "ca")
    ca, cert, key = authority.files("part", "::1")
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    for name, path in zip(TLS_ENV, (ca, cert, key), strict=True):
        monkeypatch.setenv(name, str(path))
    changes = {
        "host": "::1",
        "transfer": SETTINGS.transfer.model_copy(update={"transports": (transport,)}),
        "security": SecuritySettings(tls_ca=ca, tls_cert=cert, tls_key=key),
    }
    with LocalCluster(SETTINGS.model_copy(update=changes)) as cluster:
        cluster.wait_ready()
        assert all(view.url.startswith("https://[::1]:") for view in cluster.processes)
        answer = ask(cluster.url, dialling_with(ca))
        assert answer.status_code == 200, answer.text
        assert answer.json()["embferry"]["transfer"]["transport"] == transport
        for view in cluster.processes:
            assert view.pid is not None
            assert {str(sock.host) for sock in listening_of(view.pid)} == {"::1"}, view.name
