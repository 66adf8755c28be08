"""A router and workers with a cluster key, over sockets; strangers at the ports of workers, and relays before them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.serve.http.proofs import Proofs, worker_context
from embferry.trust.digests import CONTENT_DIGEST, MESSAGE_DIGEST, content_digest, request_digest
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.requests import BOOTSTRAP
from embferry.trust.trust import Trust
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import ANSWER, DAMAGE, FORGE, Deployment
from tests.strangers.raw_http import Relay, request, send, status_of

pytestmark = pytest.mark.integration

KEY = Key.new()
TRUST, STRANGER, NO_KEY = Trust(ClusterKeys(KEY)), Trust(ClusterKeys(Key.new())), Trust()
BODY = {
    "model": "shapes",
    "messages": user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?"),
}


class Keyed:
    """The fakes with the key, each of them as if it were a server of its own."""

    def __init__(self, app: ASGIApp, names: list[str]) -> None:
        assert TRUST.keys is not None
        self.checkers = {name: ProofChecker(TRUST.keys, worker_context(name), name) for name in names}
        self._workers = {name: Proofs(app, checker, lambda path: False) for name, checker in self.checkers.items()}
        self._bootstrap = Proofs(app, ProofChecker(TRUST.keys, BOOTSTRAP, "bootstrap"), lambda path: False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._workers.get(scope["path"].split("/")[1], self._bootstrap)(scope, receive, send)


class KeyedDeployment(Deployment):
    """The fakes have the key; the router has what the environment says. Requests to workers pass relays."""

    def _app(self) -> ASGIApp:
        self.keyed = Keyed(super()._app(), [*self.fakes])
        return self.keyed

    @property
    def at(self) -> tuple[str, int]:
        return "127.0.0.1", urlsplit(self.fake_url).port or 0


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyedDeployment]:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", KEY.written())
    with KeyedDeployment() as running:
        yield running


@pytest.fixture
def relayed(deployment: KeyedDeployment) -> Iterator[dict[str, Relay]]:
    """Relays before both workers, by role."""
    with Relay(deployment.at) as encode, Relay(deployment.at) as language:
        relays = {"encode": encode, "language": language}
        deployment.workers = [
            deployment.entry(f"{role}0", url=f"http://127.0.0.1:{relay.port}/{role}0") for role, relay in relays.items()
        ]
        yield relays


def ask(http: httpx.Client) -> httpx.Response:
    return http.post("/v1/chat/completions", json=BODY)


def ask_through(deployment: Deployment, http: httpx.Client, relays: dict[str, Relay]) -> None:
    """Asks until the router sends its requests through the relays."""

    def passed() -> bool:
        assert ask(http).status_code == 200
        return all(any(one.startswith(b"POST") for one in relay.requests) for relay in relays.values())

    deployment.wait(passed)


def test_a_router_and_workers_with_the_key_answer(deployment: KeyedDeployment, http: httpx.Client) -> None:
    for _ in range(3):
        assert ask(http).json()["choices"][0]["message"]["content"] == "a red circle"
    assert [len(deployment.fakes[name].requests) for name in ("encode0", "language0")] == [3, 3]


@pytest.mark.parametrize("trust", [STRANGER, NO_KEY])
def test_a_router_without_the_key_gets_nothing(monkeypatch: pytest.MonkeyPatch, trust: Trust) -> None:
    monkeypatch.setattr(Trust, "of_environment", lambda: trust)
    with KeyedDeployment() as deployment, httpx.Client(base_url=deployment.url, timeout=60) as http:
        answer = ask(http)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
        assert "[wrong_key]" in answer.json()["error"]["message"]
        assert not any(fake.requests for fake in deployment.fakes.values())


def test_a_router_with_a_key_sends_nothing_to_workers_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trust, "of_environment", lambda: TRUST)
    with Deployment() as deployment, httpx.Client(base_url=deployment.url, timeout=60) as http:
        assert ask(http).json()["error"]["code"] == "no_worker"
        assert not any(fake.requests for fake in deployment.fakes.values())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/encode"),
        ("POST", "/generate"),
        ("DELETE", "/rooms/1"),
        ("GET", "/embeddings/1"),
        ("GET", "/debug/pool"),
    ],
)
def test_a_stranger_at_a_worker_gets_401_before_its_body_is_read(
    deployment: KeyedDeployment, method: str, path: str
) -> None:
    body, target = b"x" * 1000, "/encode0" + path
    digests = {
        "Content_Digest": content_digest(body),
        "Embferry_Digest": request_digest(method, target, str(len(body)), content_digest(body)),
    }
    for authorization in ("", "Embferry", "Bearer x"):
        sent = request(method, target, body, Authorization=authorization, **digests)
        assert status_of(send(deployment.at, sent[: -len(body) + 1], shuts=False)) == 401
    assert deployment.fakes["encode0"].requests == deployment.fakes["encode0"].aborted == []


def test_a_recorded_request_is_carried_out_once(
    deployment: KeyedDeployment, http: httpx.Client, relayed: dict[str, Relay]
) -> None:
    ask_through(deployment, http, relayed)
    before = {name: len(fake.requests) for name, fake in deployment.fakes.items()}
    for relay in relayed.values():
        recorded = next(one for one in relay.requests if one.startswith(b"POST"))
        for _ in range(2):
            assert b'reason="count_used"' in send(deployment.at, recorded)
    moved = next(one for one in relayed["encode"].requests if one.startswith(b"POST"))
    assert b"401" in send(deployment.at, moved.replace(b"/encode0/", b"/encode1/"))
    assert {name: len(fake.requests) for name, fake in deployment.fakes.items()} == before


def changed_body(data: bytes) -> bytes:
    """A stranger changes the body and every digest of it."""
    head, end, body = data.partition(b"\r\n\r\n")
    method, target, _ = head.decode().split(" ", 2)
    changed = body.replace(b"?", b"!")
    if changed == body:
        return data
    digest = content_digest(changed)
    for name, value in (
        (CONTENT_DIGEST, digest),
        (MESSAGE_DIGEST, request_digest(method, target, str(len(body)), digest)),
    ):
        head = re.sub(rf"(?im)^{name}: [^\r]*".encode(), f"{name}: {value}".encode(), head)
    return head + end + changed


def test_a_question_that_is_changed_on_its_way_is_not_answered(
    deployment: KeyedDeployment, http: httpx.Client, relayed: dict[str, Relay]
) -> None:
    ask_through(deployment, http, relayed)
    before = len(deployment.fakes["language0"].requests)
    relayed["language"].on_request = changed_body
    assert ask(http).status_code >= 500
    assert len(deployment.fakes["language0"].requests) == before


@pytest.mark.parametrize("script", [FORGE, DAMAGE])
def test_a_line_that_a_stranger_has_written_is_not_used(
    deployment: KeyedDeployment, http: httpx.Client, script: str
) -> None:
    language = deployment.fakes["language0"]
    language.scripts = [[script], list(ANSWER)]
    assert ask(http).json()["choices"][0]["message"]["content"] == "a red circle"
    assert len(language.requests) == 2


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "no proof": lambda data: re.sub(rb"(?i)embferry-proof: [^\r]*\r\n", b"", data),
    "another status": lambda data: data.replace(b"HTTP/1.1 200", b"HTTP/1.1 503"),
}


@pytest.mark.parametrize("role", ["encode", "language"])
@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_of_a_worker_that_is_not_proved_is_an_error(
    deployment: KeyedDeployment, http: httpx.Client, relayed: dict[str, Relay], role: str, what: str
) -> None:
    ask_through(deployment, http, relayed)
    relayed[role].on_answer = ANSWERS[what]
    answer = ask(http)
    assert answer.status_code in (502, 503)
    assert "no proof of the cluster key" in answer.json()["error"]["message"]


def test_a_worker_that_forgets_its_clients_is_asked_again(deployment: KeyedDeployment, http: httpx.Client) -> None:
    """As after more clients than it remembers: the body is sent once more."""
    assert ask(http).status_code == 200
    for checker in deployment.keyed.checkers.values():
        checker._verifier._nonce = "0" * 32
    assert ask(http).status_code == 200
