"""``X-Forwarded-For``: a proxy before a router writes it; at a worker, only a stranger can."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from embferry.serve.config import RouterSettings, Settings
from embferry.serve.http.proofs import OPEN_PATHS, Proofs
from embferry.serve.router import process as router_process
from embferry.serve.worker.http import worker_app
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.proof_checker import ProofChecker
from tests.serve.test_ambiguous_heads import address_in
from tests.serve.test_tls import Served
from tests.strangers.raw_http import request, send, status_of

pytestmark = pytest.mark.integration

FORGED = "192.0.2.77"


def test_a_stranger_cannot_have_a_worker_log_the_address_of_another(caplog: pytest.LogCaptureFixture) -> None:
    service: Any = SimpleNamespace(fault=None, load=0)
    checker = ProofChecker(ClusterKeys(Key.new()), b"worker", "the encode worker")
    with Served(Proofs(worker_app(service, []), checker, OPEN_PATHS.__contains__), clients=False) as server:
        answer = send(address_in(server.url), request("POST", "/encode", b"x", X_Forwarded_For=FORGED), shuts=False)
    assert status_of(answer) == 401
    (line,) = [record.getMessage() for record in caplog.records if "refused a request" in record.getMessage()]
    assert "127.0.0.1" in line
    assert FORGED not in line


def test_a_router_sees_through_a_proxy_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    async def serve(*arguments: Any, **options: Any) -> None:
        given.update(options)

    async def name_client(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(scope["client"][0])(scope, receive, send)

    monkeypatch.setattr(router_process, "serve_app", serve)
    router_process.run(Settings(router=RouterSettings(port=0)))
    with Served(name_client, clients=False, behind_proxy=given["behind_proxy"]) as server:
        answer = send(address_in(server.url), request("GET", "/", X_Forwarded_For=FORGED), shuts=False)
    assert answer.endswith(FORGED.encode())
