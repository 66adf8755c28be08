"""API keys, and the limits of a router's clients."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.observe.metrics import RouterMetrics
from embferry.serve.config import RouterSettings
from embferry.serve.errors import ServeError
from embferry.serve.http import clients as module
from embferry.serve.http.api_keys import (
    ApiKey,
    ApiKeys,
    ApiKeysError,
    Limits,
    digest_of,
    limits_of,
    new_key,
    parse,
)
from embferry.serve.http.clients import Clients
from tests.clock import Clock
from tests.serve.fakes import HOLD, Deployment
from tests.serve.test_cli import called

CHAT = {"model": "shapes", "messages": [{"role": "user", "content": "what?"}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def scope(address: str = "192.0.2.1", key: str = "") -> dict[str, Any]:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    return {"type": "http", "client": (address, 1), "headers": headers, "state": {}}


def clients_of(clock: Clock, keys: ApiKeys | None = None, **limits: Any) -> Clients:
    return Clients(keys or ApiKeys(None), RouterSettings(**limits), RouterMetrics(), clock)


def refused(clients: Clients, of: dict[str, Any]) -> ServeError | None:
    try:
        with clients.request(of):
            return None
    except ServeError as error:
        return error


def test_a_line_of_the_file_is_read_as_it_was_written() -> None:
    key = ApiKey("alice", digest_of("k"), Limits(1_000_000, 0.5, 123_456_789.5))
    assert parse(f"# comment\n\n{key.line()}  # of the team\n", "f") == (key,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("alice", "line 1"),
        ("al.ice sha256:" + "0" * 64, "line 1"),
        ("alice sha256:12", "line 1"),
        ("alice sha256:" + "0" * 64 + " speed=3", "speed=3"),
        ("alice sha256:" + "0" * 64 + " requests=0", "requests=0"),
        ("alice sha256:" + "0" * 64 + " requests=1.5", "requests=1.5"),
        ("alice sha256:" + "0" * 64 + " bytes_per_second=nan", "bytes_per_second=nan"),
        ("a sha256:" + "0" * 64 + "\na sha256:" + "1" * 64, "line 2: the name a occurs twice"),
        ("a sha256:" + "0" * 64 + "\nb sha256:" + "0" * 64, "line 2: b has the same key as a"),
        ("\n".join(f"n{n} sha256:{n:064x}" for n in range(1025)), "1025 keys"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(text: str, why: str) -> None:
    with pytest.raises(ApiKeysError, match=why):
        parse(text, "file")


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)
    ApiKeys(path)
    path.chmod(0o620)
    with pytest.raises(ApiKeysError, match="chmod go-w"):
        ApiKeys(path)


@pytest.mark.parametrize("verb", ["serve", "router"])
@pytest.mark.parametrize("option", ["--api-keys-file", "--router-api-keys-file"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none", "there is no such file; make one with: embferry keys api new NAME --file"),
        (".", "Is a directory"),
        ("latin", "it is no text in UTF-8"),
        ("odd", "line 1: a line is a name"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_told_before_anything_starts(
    verb: str, option: str, name: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "odd").write_text("one")
    status, out, err = called(verb, option, str(tmp_path / name))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"embferry: {option}: ")
    assert why in err
    assert "Errno" not in err


def test_keys_are_read_again_when_the_file_changes_and_the_last_good_ones_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(ApiKey("a", digest_of("1")).line())
    keys = ApiKeys(path, clock=clock)
    assert keys.find("1") is not None
    path.write_text("\n".join(ApiKey(name, digest_of(name)).line() for name in ("b", "c")))
    assert keys.find("1") is None
    assert keys.find("b") == ApiKey("b", digest_of("b"))
    path.write_text("nonsense")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert keys.find("c") is not None
        assert len(caplog.records) == 1
        clock.now += 60
        path.unlink()
        assert keys.find("c") is not None
    assert len(caplog.records) == 2


def test_a_key_is_made_printed_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    status, out, err = called("keys", "api", "new", "alice", "--file", str(path), "--requests", "8")
    assert (status, err) == (0, "")
    key = out.strip()
    assert called("keys", "api", "new", "bob", "--file", str(path))[0] == 0
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    found = ApiKeys(path).find(key)
    assert found == ApiKey("alice", digest_of(key), Limits(requests=8))
    status, out, err = called("keys", "api", "new", "alice", "--file", str(path))
    assert (status, out, f"the name alice is taken in {path}" in err) == (2, "", True)
    status, out, err = called("keys", "api", "new", "with a blank", "--file", str(path))
    assert (status, out, "letters, digits, - and _" in err) == (2, "", True)
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.integration
def test_the_line_of_a_request_names_its_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text(ApiKey("alice", digest_of("k")).line())
    with caplog.at_level(logging.INFO, "embferry.serve.http.edge"), Deployment(api_keys_file=path) as deployment:
        for key, address in (("k", "127.0.0.1"), ("wrong", "127.0.0.2"), ("", "127.0.0.3")):
            transport = httpx.HTTPTransport(local_address=address)
            with httpx.Client(transport=transport, base_url=deployment.url, timeout=100) as client:
                client.get("/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    named = [vars(record)["client"] for record in caplog.records if record.getMessage() == "request"]
    assert named == ["key alice", "address 127.0.0.2", "address 127.0.0.3"]


def test_a_key_on_the_command_line_is_refused_with_what_to_do() -> None:
    for words in (("router", "--api-key", "k"), ("serve", "--router-api-key", "k"), ("ask", "what?", "--api-key", "k")):
        status, _, err = called(*words)
        assert (status, "ps" in err, "EMBFERRY_ROUTER_API_KEY" in err, "k\n" in err) == (2, True, True, False)
        assert "api-key " not in called(words[0], "--help")[1]


def test_requests_at_once_are_limited_by_address() -> None:
    clients = clients_of(Clock(), client_requests=2)
    with clients.request(scope()), clients.request(scope()):
        error = refused(clients, scope())
        assert error is not None
        assert (error.code, error.http_status, error.retryable, error.retry_after) == ("rate_limited", 429, True, 1)
        assert refused(clients, scope("192.0.2.2")) is None
    assert refused(clients, scope()) is None


def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    clients = clients_of(Clock(), client_requests=1)
    with clients.request(scope("2001:db8::1")):
        assert refused(clients, scope("2001:db8::ffff")) is not None
        assert refused(clients, scope("2001:db8:1::1")) is None


def test_requests_a_second_are_limited() -> None:
    clock = Clock()
    clients = clients_of(clock, client_requests_per_second=0.5)
    assert refused(clients, scope()) is None
    error = refused(clients, scope())
    assert error is not None
    assert error.retry_after == 2
    clock.now += 2
    assert refused(clients, scope()) is None


@pytest.mark.asyncio
async def test_bytes_a_second_are_limited_from_the_next_request_on() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(250), "more_body": False}

    clock = Clock()
    clients = clients_of(clock, client_bytes_per_second=100)
    with clients.request(scope()) as client:
        await clients.counted(client, receive)()
    error = refused(clients, scope())
    assert error is not None
    assert error.retry_after == 1
    clock.now += 1
    assert refused(clients, scope()) is None


def test_a_key_has_its_own_limits_which_may_change(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    line = ApiKey("a", digest_of("k"), limits_of(["requests=1"])).line()
    path.write_text(line)
    clients = clients_of(Clock(), ApiKeys(path, "single"), client_requests=3)
    with clients.request(scope(key="k")):
        assert refused(clients, scope("192.0.2.9", key="k")) is not None  # from anywhere
        path.write_text(line.replace("requests=1", "requests=2"))
        assert refused(clients, scope(key="k")) is None
    with clients.request(scope(key="single")), clients.request(scope(key="single")):
        assert refused(clients, scope(key="single")) is None
    for wrong in ("", "K", "sha256:" + digest_of("k").hex()):
        error = refused(clients, scope(key=wrong))
        assert error is not None
        assert error.http_status == 401


def test_clients_are_forgotten_but_none_that_has_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 10)
    clients = clients_of(Clock(), client_requests=1)
    with clients.request(scope("10.0.0.1")):
        for n in range(100):
            assert refused(clients, scope(f"10.0.1.{n}")) is None
        assert len(clients._known) == 10
        assert refused(clients, scope("10.0.0.1")) is not None


@pytest.mark.integration
def test_a_router_has_keys_limits_and_metrics(tmp_path: Path) -> None:
    path, alice, bob = tmp_path / "keys", new_key(), new_key()
    path.write_text(ApiKey("alice", digest_of(alice), Limits(requests=1)).line())
    with Deployment(api_keys_file=path) as deployment, httpx.Client(base_url=deployment.url, timeout=100) as http:
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 401
        with path.open("a") as file:
            file.write("\n" + ApiKey("bob", digest_of(bob)).line())
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 200
        deployment.fakes["language0"].script = [HOLD]
        body = {**CHAT, "stream": True}
        with httpx.Client(base_url=deployment.url, timeout=100) as other:
            held = threading.Thread(
                target=lambda: other.post("/v1/chat/completions", json=body, headers=bearer(alice)), daemon=True
            )
            held.start()
            deployment.wait(lambda: deployment.fakes["language0"].holding == 1)
            answer = http.post("/v1/chat/completions", json=CHAT, headers=bearer(alice))
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.headers["x-should-retry"] == "true"
            assert http.get("/v1/models", headers=bearer(bob)).status_code == 200
            metrics = http.get("/metrics").text
            assert 'embferry_router_client_requests_total{key="alice",outcome="refused"} 1.0' in metrics
            assert 'embferry_router_client_in_flight{key="alice"} 1.0' in metrics
            sent = len(httpx.Request("POST", "http://x", json=body).content)
            assert f'embferry_router_client_bytes_total{{key="alice"}} {sent}.0' in metrics
            deployment.release.set()
            held.join(100)


def test_a_key_is_compared_whole_with_every_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The time of a look-up does not tell which key is nearly right, nor where in the file it is."""
    compared: list[bytes] = []
    path = tmp_path / "keys"
    path.write_text("\n".join(ApiKey(name, digest_of(name)).line() for name in "abc"))
    keys = ApiKeys(path)
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: bool(compared.append(one)) or one == other)
    for key in ("a", "c", "unknown"):
        keys.find(key)
    assert compared == [digest_of(name) for name in "abc"] * 3


def test_the_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        called("keys", "api", "new", "a", "--file", str(tmp_path / "keys"))
    finally:
        os.umask(previous)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
