"""A bootstrap server with a cluster key, its clients, and strangers between them and at its port."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from embferry.discovery.bootstrap_client import BootstrapClient, LeaseKeeper
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.leases import Rank, Worker
from embferry.protocol.errors import LocalProtocolError, TransportError, WrongKey
from embferry.trust.digests import content_digest
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.trust import Trust
from tests.ports import free_port
from tests.strangers.raw_http import SECONDS, Relay, request, send, status_of

pytestmark = pytest.mark.integration

KEY, OTHER = Key.new(), Key.new()
TRUST, STRANGER, NO_KEY = Trust(ClusterKeys(KEY)), Trust(ClusterKeys(OTHER)), Trust()
WORKER = Worker(id="enc-1", role="encode", url="http://h:1", endpoint="tcp://h:2", model="shapes")
BODY = b'{"id":"evil","role":"encode","url":"http://evil:1"}'
RANK = Rank(tp_size=1, dp_size=1, rank_ip="10.0.0.7", rank_port=7000, engine_rank=0)


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with BootstrapServer(port=free_port(), trust=TRUST, clock=lambda: 100.0) as server:
        yield server


@pytest.fixture
def relay(server: BootstrapServer) -> Iterator[Relay]:
    with Relay((server.host, server.port)) as relay:
        yield relay


def client_of(port: int, trust: Trust = TRUST) -> BootstrapClient:
    return BootstrapClient(f"http://127.0.0.1:{port}", trust=trust, timeout_s=SECONDS)


def at(server: BootstrapServer) -> tuple[str, int]:
    return server.host, server.port


def code_of(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


def test_everything_works_with_the_key(server: BootstrapServer) -> None:
    client = client_of(server.port)
    assert client.healthy()
    assert client.register(WORKER).new
    assert not client.register(WORKER).new
    assert client.workers("encode") == (WORKER,)
    client.register_rank(RANK)
    assert client.shape().embedding_tp_size == 1
    assert client.route(0).rank_port == 7000
    assert client.remove("enc-1")
    assert not client.remove("enc-1")
    with pytest.raises(LocalProtocolError, match="missing required field"):
        client._ok("PUT", "/workers/enc-1", {"id": "enc-1"})


def test_clients_on_many_threads_share_one_proof_of_the_key(server: BootstrapServer) -> None:
    client = client_of(server.port)
    seen: list[int] = []

    def ask() -> None:
        for _ in range(20):
            seen.append(len(client.workers()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert seen == [0] * 160


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", "/workers", b""),
        ("GET", "/workers?role=encode", b""),
        ("PUT", "/workers/evil", BODY),
        ("DELETE", "/workers/enc-1", b""),
        ("GET", "/route?engine_rank=-1&target_dp_group=-1", b""),
        ("PUT", "/route", b'{"role":"Encode","tp_size":1,"dp_size":1,"rank_ip":"e","rank_port":1,"engine_rank":0}'),
        ("GET", "/nothing", b""),
        ("GET", "//health/workers", b""),
        ("GET", "http://health/workers", b""),
        ("PURGE", "/workers", b""),
    ],
)
def test_a_stranger_reads_and_changes_nothing(server: BootstrapServer, method: str, target: str, body: bytes) -> None:
    client_of(server.port).register(WORKER)
    for authorization in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Embferry"}):
        answer = send(at(server), request(method, target, body, **authorization))
        assert (status_of(answer), code_of(answer)) == (401, "proof_required")
        assert b"enc-1" not in answer
    assert server.workers() == (WORKER,)


def test_health_and_metrics_are_open(server: BootstrapServer) -> None:
    for target in ("/health", "/metrics"):
        assert status_of(send(at(server), request("GET", target))) == 200


def test_a_wrong_key_is_told_at_once_and_logged_once_with_the_address(
    server: BootstrapServer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with pytest.raises(WrongKey, match="another cluster key") as caught:
            client_of(server.port, STRANGER).register(WORKER)
        assert caught.value.code == "wrong_key"
    lines = [record.getMessage() for record in caplog.records if "wrong cluster key" in record.getMessage()]
    assert len(lines) == 1
    assert "127.0.0.1" in lines[0]
    assert server.workers() == ()


def test_an_end_without_a_key_and_one_with_a_key_say_which_of_them_has_none(server: BootstrapServer) -> None:
    with pytest.raises(WrongKey, match="this end has none"):
        client_of(server.port, NO_KEY).workers()
    with BootstrapServer(trust=NO_KEY) as other, pytest.raises(WrongKey, match="has no cluster key"):
        client_of(other.port).register(WORKER)
    assert other.workers() == ()


def test_a_keeper_says_that_its_key_is_wrong_and_goes_on_with_the_right_one(
    server: BootstrapServer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ClusterKeys(OTHER)
    keeper = LeaseKeeper(client_of(server.port, Trust(keys)), WORKER)
    keeper.start()
    try:
        for _ in range(int(SECONDS / 0.01)):
            if "[wrong_key]" in caplog.text:
                break
            keeper.wait_registered(0.01)
        assert "[wrong_key]" in caplog.text
        keys._keys = (KEY,)
        assert keeper.wait_registered(SECONDS)
    finally:
        keeper.stop()


def test_a_recorded_request_is_worth_nothing(server: BootstrapServer, relay: Relay) -> None:
    client = client_of(relay.port)
    client.register(WORKER)
    client.remove("enc-1")
    asked = [one for one in relay.requests if one.startswith((b"PUT", b"DELETE"))]
    assert len(asked) == 2
    for one in asked * 2:
        answer = send(at(server), one)
        assert (status_of(answer), code_of(answer)) == (401, "count_used")
    assert server.workers() == ()
    with BootstrapServer(trust=TRUST) as restarted:  # it has another nonce
        answer = send(at(restarted), asked[0])
        assert (status_of(answer), code_of(answer)) == (401, "nonce_unknown")


def test_a_client_goes_on_with_a_restarted_server(server: BootstrapServer) -> None:
    client = client_of(server.port)
    client.register(WORKER)
    server.stop()
    with BootstrapServer(port=server.port, trust=TRUST):
        assert client.register(WORKER).new


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "method": lambda data: data.replace(b"PUT ", b"POST "),
    "target": lambda data: data.replace(b"/workers/enc-1 ", b"/workers/enc-2 "),
    "query": lambda data: data.replace(b"/workers/enc-1 ", b"/workers/enc-1?a "),
    "body": lambda data: data.replace(b'"http://h:1"', b'"http://e:1"'),
    "body and digest": lambda data: _with_digest(data.replace(b'"http://h:1"', b'"http://e:1"')),
    "no digest": lambda data: re.sub(rb"(?i)content-digest: [^\r]*\r\n", b"", data),
}


def _with_digest(data: bytes) -> bytes:
    body = data.partition(b"\r\n\r\n")[2]
    return re.sub(rb"sha-256=:[^:]*:", content_digest(body).encode(), data)


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_request_is_refused(server: BootstrapServer, relay: Relay, what: str) -> None:
    client = client_of(relay.port)
    client.workers()
    relay.on_request = lambda data: CHANGES[what](data) if b'"http://h:1"' in data else data
    with pytest.raises((WrongKey, LocalProtocolError)):
        client.register(WORKER)
    assert server.workers() == ()
    relay.on_request = lambda data: data
    client.register(WORKER)
    assert server.workers() == (WORKER,)


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "status": lambda data: data.replace(b"200 OK", b"201 OK"),
    "body": lambda data: data.replace(b"http://h:1", b"http://e:1"),
    "body and digest": lambda data: _with_digest(data.replace(b"http://h:1", b"http://e:1")),
    "no proof": lambda data: re.sub(rb"(?i)embferry-proof: [^\r]*\r\n", b"", data),
    "another": lambda data: b'HTTP/1.1 200 \r\nContent-Length: 14\r\n\r\n{"workers":[]}',
    "a refusal": lambda data: b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_changed_answer_is_not_used(server: BootstrapServer, relay: Relay, what: str) -> None:
    client = client_of(relay.port)
    client.register(WORKER)
    relay.on_answer = ANSWERS[what]
    with pytest.raises(TransportError, match=r"proof|damaged"):
        client.workers()
    relay.on_answer = lambda data: data
    assert client.workers() == (WORKER,)


def test_the_answer_to_an_earlier_request_is_not_used(server: BootstrapServer, relay: Relay) -> None:
    client = client_of(relay.port)
    client.register(WORKER)
    assert client.workers() == (WORKER,)
    recorded = relay.answers[-1]
    relay.on_answer = lambda data: recorded
    with pytest.raises(TransportError, match="proof"):
        client.workers()


def test_damage_without_a_key_is_found_too() -> None:
    with BootstrapServer(trust=NO_KEY, clock=lambda: 100.0) as server, Relay(at(server)) as relay:
        client = client_of(relay.port, NO_KEY)
        relay.on_request = CHANGES["body"]
        with pytest.raises(LocalProtocolError, match="Content-Digest"):
            client.register(WORKER)
        assert server.workers() == ()
        relay.on_request = lambda data: data
        client.register(WORKER)
        relay.on_answer = ANSWERS["body"]
        with pytest.raises(TransportError, match="damaged"):
            client.workers()


def test_a_flood_of_bad_proofs_takes_no_place_and_the_honest_go_on(server: BootstrapServer) -> None:
    client = client_of(server.port)
    client.register(WORKER)
    challenge = send(at(server), request("GET", "/workers"))
    found = re.search(rb'nonce="([0-9a-f]{32})"', challenge)
    assert found is not None
    nonce = found[1].decode()
    for number in range(300):
        stranger = f'Embferry nonce="{nonce}", client="{number:032x}", count=1, proof="{0:064x}"'
        assert code_of(send(at(server), request("GET", "/workers", Authorization=stranger))) == "wrong_key"
    assert server._checker is not None
    assert len(server._checker._verifier) == 1
    assert client.workers() == (WORKER,)


def test_the_origin_s_ranks_are_let_in_by_a_setting_only(server: BootstrapServer) -> None:
    put = request(
        "PUT", "/route", b'{"role":"Encode","tp_size":1,"dp_size":1,"rank_ip":"h","rank_port":1,"engine_rank":0}'
    )
    assert status_of(send(at(server), put)) == 401
    with BootstrapServer(trust=TRUST, unproved_ranks=True) as server:
        assert status_of(send(at(server), put)) == 200
        assert status_of(send(at(server), request("GET", "/route?engine_rank=0&target_dp_group=0"))) == 200
        assert status_of(send(at(server), request("GET", "/workers"))) == 401


@pytest.mark.parametrize("trust", [TRUST, NO_KEY])
def test_our_own_ranks_find_servers_with_and_without_a_key(trust: Trust) -> None:
    with BootstrapServer(trust=trust) as server:
        client = BootstrapClient(server.url, trust=TRUST, must_prove=False, timeout_s=SECONDS)
        client.register_rank(RANK)
        assert client.route(0).rank_port == 7000


def test_a_server_that_strangers_can_reach_needs_a_key_or_leave() -> None:
    with pytest.raises(LocalProtocolError, match="embferry keys new"):
        BootstrapServer("0.0.0.0", trust=NO_KEY).start()
    for trust in (TRUST, Trust(insecure=True)):
        with BootstrapServer("0.0.0.0", trust=trust):
            pass


# IPv6


@pytest.mark.parametrize("trust", [TRUST, NO_KEY])
def test_a_server_and_its_clients_on_ipv6(trust: Trust) -> None:
    with BootstrapServer("::1", trust=trust) as server:
        assert server.url == f"http://[::1]:{server.port}"
        client = BootstrapClient(server.url, trust=trust, timeout_s=SECONDS)
        client.register(WORKER)
        assert client.workers() == (WORKER,)
