"""``embferry status``: what it prints, and the exit status of each state of a router."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.serve.http.watching import ACTIVITY
from embferry.trust.trust import TLS_ENV
from tests.cli.servers import router
from tests.cli.test_wrapping import on_terminal
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import BREAK, POOL, Deployment, closed_port
from tests.serve.test_cli import called
from tests.serve.test_tls import Served
from tests.trust.authority import Authority

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}


@pytest.fixture
def ready(deployment: Deployment) -> Deployment:
    deployment.wait(lambda: deployment.get("/ready").status_code == 200)
    return deployment


def ask(deployment: Deployment, **more: Any) -> int:
    body = {"messages": user(PICTURE, "?"), **more}
    return httpx.post(f"{deployment.url}{CHAT}", json=body, timeout=60).status_code


def told(*urls: str, words: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Returns the exit status and the JSON."""
    options = [word for url in urls for word in ("--url", url)]
    status, out, err = called("status", "--json", *options, *words)
    assert err == ""
    return status, json.loads(out)


def test_a_router_that_is_well(ready: Deployment) -> None:
    assert ask(ready) == 200
    status, out, err = called("status", "--url", f"{ready.url}/v1")
    assert (status, err) == (0, "")
    first, *lines = out.splitlines()
    assert first.startswith(f"{ready.url} · ready · shapes · ")
    assert lines[:4] == [
        "  encode     1 of 1 up, 0 requests",
        "  language   1 of 1 up, 0 requests, 1 of 4 blocks in use",
        "  requests   0 under way",
        "  5 min      7 resumed transfers, 0 retries, 0 failovers, 0 errors",
    ]
    assert lines[4].startswith("  times      first token ")


def test_its_numbers_are_those_of_activity(ready: Deployment) -> None:
    ask(ready)
    ask(ready, max_tokens=-1)
    status, found = told(ready.url)
    known = ready.get(ACTIVITY).json()
    assert (status, found["state"]) == (0, "ready")
    (one,) = found["routers"]
    assert [(worker["id"], worker["up"], worker["requests"]) for worker in one["workers"]] == [
        (worker["id"], worker["up"], worker["in_flight"]) for worker in known["workers"]
    ]
    assert one["pools"] == [
        {"worker": "language0", "blocks": POOL["num_blocks"], "used": POOL["used"], "quarantined": 0, "error": ""}
    ]
    assert (one["version"], one["engine"], one["models"]) == (known["router"], known["engine"], ["shapes"])
    counts = {event["kind"]: event["count"] for event in known["events"]}
    assert (one["recent"]["resumes"], one["recent"]["errors"]) == (counts["resumed"], counts["error"]) == (7, 1)
    ((_, count, total, _, highest),) = known["samples"]["ttft"]
    assert one["times"]["ttft"] == {"count": count, "mean": total / count, "highest": highest}


def test_a_worker_that_has_failed_lately(ready: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embferry.serve.router.fleet.SUSPECT_SECONDS", 1000.0)
    ready.workers.append(ready.entry("language1"))
    ready.wait(lambda: ready.get("/ready").json()["workers"]["language"] == 2)
    ready.fakes["language0"].scripts = [[BREAK]]
    assert ask(ready) == 200
    status, found = told(ready.url)
    (one,) = found["routers"]
    assert (status, found["state"], one["state"]) == (1, "degraded", "degraded")
    (reason,) = one["reasons"]
    assert reason.endswith(": it has failed lately and is asked last")
    assert (one["recent"]["retries"], one["recent"]["failed_calls"]) == (1, 1)


def test_a_pool_that_cannot_be_asked(ready: Deployment) -> None:
    ready.fakes["language0"].refusal = (500, {})
    status, found = told(ready.url)
    assert (status, found["state"]) == (1, "degraded")
    assert found["routers"][0]["reasons"] == ["the receive pool of language 0 is not known: status 500"]


def test_a_worker_that_is_gone(ready: Deployment) -> None:
    ready.workers = [ready.entry(name) for name in ("encode0", "encode1", "language0")]
    ready.wait(lambda: ready.get("/ready").json()["workers"]["encode"] == 2)
    assert told(ready.url, words=("--encoders", "2", "--languages", "1"))[0] == 0
    del ready.workers[0]
    ready.wait(lambda: ready.get("/ready").json()["workers"]["encode"] == 1)
    status, found = told(ready.url)
    assert (status, found["routers"][0]["reasons"]) == (1, ["1 encode worker is gone, and none has come instead"])
    reasons = told(ready.url, words=("--encoders", "2"))[1]["routers"][0]["reasons"]
    assert reasons[0] == "1 encoder is up, and 2 must be"


def test_a_router_without_workers_is_not_ready(deployment: Deployment) -> None:
    deployment.workers = []
    no_worker = ["no encode worker has a live lease", "no language worker has a live lease"]
    deployment.wait(lambda: deployment.get("/ready").json()["missing"] == no_worker)
    status, found = told(deployment.url)
    assert (status, found["state"]) == (3, "not_ready")
    assert found["routers"][0]["reasons"][:2] == no_worker


def test_no_router(ready: Deployment) -> None:
    with closed_port() as url:
        status, out, err = called("status", "--url", url)
        assert (status, err) == (3, "")
        assert f"{url} · no answer\n" in out
        assert f"no server responds at {url} ([Errno 111] Connection refused)" in out
        status, found = told(ready.url, url)
    assert (status, found["state"]) == (3, "no_answer")
    assert [one["state"] for one in found["routers"]] == ["ready", "no_answer"]


def test_another_server_is_no_router() -> None:
    with router() as other:
        status, found = told(other.url)
    assert status == 3
    assert found["routers"][0]["reasons"][0].startswith(
        f"the server at {other.url} is no router, or one of another version: "
    )


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        status, found = told(url, words=("--timeout", "0.2"))
    assert status == 3
    assert found["routers"][0]["reasons"] == [f"the server at {url} does not answer within 0.2 s; is it a router?"]


@pytest.mark.parametrize("deployment", [{"api_key": "sesame-7"}], indirect=True)
def test_the_api_key_comes_from_the_environment_alone(ready: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = told(ready.url)
    assert (status, found["routers"][0]["reasons"]) == (
        3, ["the router asks for an API key; set EMBFERRY_ROUTER_API_KEY to it"],
    )  # fmt: skip
    monkeypatch.setenv("EMBFERRY_ROUTER_API_KEY", "wrong-7")
    status, found = told(ready.url)
    assert status == 3
    assert "the router does not know the API key in EMBFERRY_ROUTER_API_KEY" in found["routers"][0]["reasons"][0]
    monkeypatch.setenv("EMBFERRY_ROUTER_API_KEY", "sesame-7\n")
    assert told(ready.url)[0] == 0
    status, _, err = called("status", "--url", ready.url, "--api-key", "sesame-7")
    assert (status, "every user of this machine can read a command line" in err) == (2, True)


@pytest.mark.parametrize("words", [("--url", "ftp://h"), ("--minutes", "0"), ("--minutes", "11"), ("--encoders", "-1")])
def test_wrong_options_have_the_status_of_wrong_options(words: tuple[str, ...]) -> None:
    status, out, err = called("status", *words)
    assert (status, out) == (2, "")
    assert err


def test_a_password_in_a_url_is_not_printed(ready: Deployment) -> None:
    status, out, _ = called("status", "--url", ready.url.replace("://", "://me:hunter2@"))
    assert (status, "hunter2" in out) == (0, False)
    with closed_port() as url:
        assert "hunter2" not in called("status", "--url", url.replace("://", "://me:hunter2@"))[1]


def test_a_router_with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority.make(tmp_path)
    for name, path in zip(TLS_ENV, authority.files("part", "127.0.0.1"), strict=True):
        monkeypatch.setenv(name, str(path))
    with Served(clients=False) as served:
        status, found = told(served.url, words=("--ca", str(authority.ca)))
        assert (status, "status 404" in found["routers"][0]["reasons"][0]) == (3, True)  # it has no activity
        monkeypatch.delenv(TLS_ENV[0])
        status, found = told(served.url)
        assert (status, "the certificate is not accepted" in found["routers"][0]["reasons"][0]) == (3, True)
        status, found = told(served.url.replace("https", "http"))
        assert (status, f"Write https:// instead: {served.url}" in found["routers"][0]["reasons"][0]) == (3, True)


@pytest.mark.parametrize("no_colour", [False, True])
def test_on_a_terminal_lines_fit_and_the_state_has_a_colour(ready: Deployment, no_colour: bool) -> None:
    environ = {**os.environ, "COLUMNS": "40", "TERM": "xterm"} | ({"NO_COLOR": "1"} if no_colour else {})
    command = [sys.executable, "-m", "embferry", "status", "--url", ready.url]
    shown = on_terminal("stdout", command, environ)
    assert ("\x1b[32m" in shown) is not no_colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= 40
    piped = subprocess.run(command, capture_output=True, text=True, env=environ, check=True).stdout
    assert "\x1b" not in piped
    assert piped.split() == plain.split()
