"""The http transport with a cluster key: all of the suite, strangers at the sender's port, and a relay in between."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest

from embferry.protocol.errors import LocalProtocolError
from embferry.testing.conformance import TransportConformance
from embferry.testing.pair import CANARY, LARGE, Endpoint, TransportPair
from embferry.transports.contract import Transport
from embferry.transports.http import HttpTransport
from embferry.transports.http.messages import HttpAddress, HttpHandle, Publication, proof_context, proved_target
from embferry.trust.digests import content_digest
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.requests import MAX_CHALLENGES, PROOF_HEADER, Prover
from embferry.trust.trust import Trust
from tests.ports import free_port
from tests.strangers.raw_http import Relay, request, send, status_of
from tests.transports.test_http import BehindProxy, http_proxy

pytestmark = pytest.mark.integration

KEY = Key.new()
TRUST, STRANGER = Trust(ClusterKeys(KEY)), Trust(ClusterKeys(Key.new()))
TOKEN = bytes(range(16))
HANDLE = msgspec.msgpack.encode(HttpHandle(TOKEN))
POLL = f"/embferry/1/{TOKEN.hex()}?after=0"


class TestHttpWithKey(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return HttpTransport(wake, trust=TRUST)


class TestHttpWithKeyThroughProxy(BehindProxy):
    trust = TRUST


class Sender(Endpoint):
    """A sender with the key, connected to a receiver whose requests the test makes."""

    def __init__(self) -> None:
        super().__init__(lambda wake: HttpTransport(wake, trust=TRUST))
        self.transport.connect(HANDLE)
        decoded = msgspec.msgpack.decode(self.transport.address, type=HttpAddress)
        self.at = ("127.0.0.1", int(decoded.base.rpartition(":")[2]))
        self.secret = decoded.secret.hex()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    def ask(self, method: str, target: str, authorization: str) -> bytes:
        return send(self.at, request(method, target, Authorization=authorization, Prefer="wait=0"), shuts=False)

    def client(self, keys: ClusterKeys | None = TRUST.keys, secret: str | None = None) -> Prover:
        """Returns a client that has the sender's nonce."""
        assert keys is not None
        prover = Prover(keys.current, proof_context(self.secret if secret is None else secret))
        prover.on_challenge(header(self.ask("GET", POLL, "Embferry"), "WWW-Authenticate"))
        assert prover.has_nonce
        return prover


@pytest.fixture
def sender() -> Iterator[Sender]:
    with Sender() as sender:
        yield sender


def header(answer: bytes, name: str) -> str | None:
    found = re.search(rf"(?im)^{name}: (.*)\r$", answer.partition(b"\r\n\r\n")[0].decode() + "\r\n")
    return None if found is None else found[1]


def reason_of(answer: bytes) -> str:
    found = re.search(r'reason="(\w+)"', header(answer, "WWW-Authenticate") or "")
    return "" if found is None else found[1]


# Strangers at the port of a sender


def test_a_stranger_reads_and_ends_nothing(sender: Sender) -> None:
    for method, target in (("GET", POLL), ("DELETE", POLL.partition("?")[0]), ("GET", "/"), ("DELETE", POLL + "/1")):
        for authorization in ("", "Embferry", f"Bearer {sender.secret}", f"Basic {sender.secret}"):
            answer = sender.ask(method, target, authorization)
            assert (status_of(answer), reason_of(answer)) == (401, "proof_required")
    assert sender.transport.poll() == []


def test_the_key_without_the_secret_and_the_secret_without_the_key_are_refused(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    for client in (sender.client(STRANGER.keys), sender.client(secret="0" * 32)):
        for _ in range(3):
            answer = sender.ask("GET", POLL, client.prove("GET", POLL).authorization)
            assert (status_of(answer), reason_of(answer)) == (401, "wrong_key")
    assert status_of(sender.ask("GET", POLL, sender.client().prove("GET", POLL).authorization)) == 204
    lines = [record.getMessage() for record in caplog.records if "wrong cluster key" in record.getMessage()]
    assert len(lines) == 1
    assert "127.0.0.1" in lines[0]


def test_a_request_is_carried_out_once_and_unchanged(sender: Sender) -> None:
    client = sender.client()
    proved = client.prove("GET", POLL)
    assert reason_of(sender.ask("DELETE", POLL, proved.authorization)) == "wrong_key"
    assert reason_of(sender.ask("GET", POLL.replace("after=0", "after=9"), proved.authorization)) == "wrong_key"
    answer = sender.ask("GET", POLL, proved.authorization)
    assert status_of(answer) == 204
    assert proved.is_answered_by(204, None, header(answer, PROOF_HEADER))
    for _ in range(2):
        assert reason_of(sender.ask("GET", POLL, proved.authorization)) == "count_used"
    with Sender() as other:  # another nonce, another secret
        assert reason_of(other.ask("GET", POLL, proved.authorization)) == "nonce_unknown"


def test_a_replay_on_the_same_connection_is_refused(sender: Sender) -> None:
    authorization = sender.client().prove("GET", POLL).authorization
    once = request("GET", POLL, Authorization=authorization, Prefer="wait=0").replace(b"Connection: close\r\n", b"")
    answers = send(sender.at, once + request("GET", POLL, Authorization=authorization), shuts=False)
    first, second = re.findall(rb"(?m)^HTTP/1.1 (\d+)", answers)
    assert (first, second) == (b"204", b"401")


def test_a_flood_of_bad_proofs_takes_no_place_and_the_honest_go_on(sender: Sender) -> None:
    client = sender.client()
    assert status_of(sender.ask("GET", POLL, client.prove("GET", POLL).authorization)) == 204
    stranger = sender.client(STRANGER.keys)
    for _ in range(200):
        assert reason_of(sender.ask("GET", POLL, stranger.prove("GET", POLL).authorization)) == "wrong_key"
    transport = sender.transport
    assert isinstance(transport, HttpTransport)
    assert transport._server is not None
    assert transport._server._checker is not None
    assert len(transport._server._checker._verifier) == 1
    assert status_of(sender.ask("GET", POLL, client.prove("GET", POLL).authorization)) == 204


def test_a_connection_full_of_requests_without_a_proof_ends_soon(sender: Sender) -> None:
    unproved = request("GET", POLL).replace(b"Connection: close\r\n", b"")
    answers = send(sender.at, unproved * 100, shuts=False)
    assert re.findall(rb"(?m)^HTTP/1.1 (\d+)", answers) == [b"401"] * (MAX_CHALLENGES + 1)
    client = sender.client()  # proved requests between them begin the count anew
    mixed = b""
    for _ in range(MAX_CHALLENGES):
        proved = request("GET", POLL, Authorization=client.prove("GET", POLL).authorization, Prefer="wait=0")
        mixed += unproved * MAX_CHALLENGES + proved.replace(b"Connection: close\r\n", b"")
    answers = send(sender.at, mixed + request("GET", POLL), shuts=False)
    refused = [b"401"] * MAX_CHALLENGES
    assert re.findall(rb"(?m)^HTTP/1.1 (\d+)", answers) == [*refused, b"204"] * MAX_CHALLENGES + [b"401"]


def test_a_list_has_a_digest_that_its_proof_covers(sender: Sender) -> None:
    pair = TransportPair(HttpTransport)
    try:
        sender.transport.write(HANDLE, 7, (0,), pair.fill((0,)), 1)
        proved = sender.client().prove("GET", POLL)
        answer = sender.ask("GET", POLL, proved.authorization)
        body = answer.partition(b"\r\n\r\n")[2]
        assert len(msgspec.msgpack.decode(body, type=list[Publication])) == 1
        assert header(answer, "Content-Digest") == content_digest(body)
        assert proved.is_answered_by(200, content_digest(body), header(answer, PROOF_HEADER))
        assert not proved.is_answered_by(200, None, header(answer, PROOF_HEADER))
    finally:
        pair.close()


def test_the_target_of_a_proof_is_what_the_sender_sees_behind_any_proxy() -> None:
    target = f"/embferry/1/{TOKEN.hex()}/7?outcome=written"
    for before in ("", "/some/where", "http://192.0.2.1:80", "http://h/embferry/1"):
        assert proved_target(before + target) == target
    assert proved_target("/") == "/"


def test_a_sender_that_strangers_can_reach_needs_a_key_or_leave() -> None:
    make = partial(HttpTransport, host="0.0.0.0", advertise="127.0.0.1")
    transport = make(trust=Trust())
    with pytest.raises(LocalProtocolError, match="embferry keys new"):
        _ = transport.address
    transport.close()
    for trust in (TRUST, Trust(insecure=True)):
        transport = make(trust=trust)
        assert transport.address
        transport.close()


# Both ends, and what is in between


@pytest.mark.parametrize("trust", [STRANGER, Trust()])
@pytest.mark.parametrize("key_is_of", ["sender", "receiver"])
def test_ends_with_different_keys_exchange_nothing(trust: Trust, key_is_of: str) -> None:
    made = iter([trust, TRUST] if key_is_of == "sender" else [TRUST, trust])  # the receiver is made first
    pair = TransportPair(lambda wake: HttpTransport(wake, stall_timeout_s=0.3, trust=next(made)))
    try:
        pair.admit(1, (0,))
        assert pair.write(1, (0,), pair.fill((0,))) is not None
        pair.expect()
    finally:
        pair.close()


def test_a_sender_with_a_key_behind_a_reverse_proxy() -> None:
    port = free_port()
    with http_proxy(str(port)) as front:
        advertise = f"http://127.0.0.1:{front}/some/where/"
        transports = iter((HttpTransport(trust=TRUST), HttpTransport(port=port, advertise=advertise, trust=TRUST)))

        def make(wake: Callable[[], None]) -> Transport:
            transport = next(transports)
            transport.wake = wake
            return transport

        pair = TransportPair(make, LARGE)
        blocks = tuple(range(64))
        pair.admit(1, blocks)
        pieces = pair.fill(blocks)
        assert pair.write(1, blocks, pieces) is None
        pair.expect(pieces)
        pair.close()


class RelayedPair(TransportPair):
    """A pair whose receiver reaches the sender through a relay."""

    def __init__(self, trust: Trust) -> None:
        port = free_port()
        self.relay = Relay(("127.0.0.1", port))
        self.relay.__enter__()
        front = f"http://127.0.0.1:{self.relay.port}/"
        receiver = HttpTransport(poll_s=1.0, trust=trust)
        sender = HttpTransport(port=port, advertise=front, poll_s=1.0, trust=trust)
        transports = iter((receiver, sender))

        def make(wake: Callable[[], None]) -> Transport:
            transport = next(transports)
            transport.wake = wake
            return transport

        super().__init__(make)

    def close(self) -> None:
        super().close()
        self.relay.__exit__(None, None, None)


PAYLOAD = (b"HTTP/1.1 200", b"ETag: ")


def _changes(data: bytes, old: bytes, new: bytes, having: tuple[bytes, ...]) -> bytes:
    head, end, body = data.partition(b"\r\n\r\n")
    return head.replace(old, new) + end + body if all(part in head for part in having) else data


def _list_changed(data: bytes, *, mends: bool) -> bytes:
    head, end, body = data.partition(b"\r\n\r\n")
    if b"application/msgpack" not in head:
        return data
    publication = msgspec.msgpack.decode(body, type=list[Publication])[0]
    ranges = [publication.ranges[at : at + 16] for at in range(0, len(publication.ranges), 16)]
    changed = msgspec.msgpack.encode([msgspec.structs.replace(publication, ranges=b"".join(ranges[::-1]))])
    if mends:
        head = re.sub(rb"sha-256=:[^:]*:", content_digest(changed).encode(), head)
    return head + end + changed


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "status": lambda data: _changes(data, b"HTTP/1.1 200", b"HTTP/1.1 206", PAYLOAD),
    "no proof": lambda data: _changes(data, b"mbferry-", b"mbferry_", PAYLOAD),
    "list": lambda data: _list_changed(data, mends=False),
    "list and digest": lambda data: _list_changed(data, mends=True),
    "gone": lambda data: b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n" if b"msgpack" in data else data,
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_is_changed_once_is_asked_for_again(what: str) -> None:
    pair = RelayedPair(TRUST)
    changed: list[bytes] = []

    def once(data: bytes) -> bytes:
        after = data if changed else ANSWERS[what](data)
        if after != data:
            changed.append(after)
        return after

    try:
        pair.relay.on_answer = once
        pair.admit(1, (0,))
        pieces = pair.fill((0,))
        assert pair.write(1, (0,), pieces) is None
        pair.expect(pieces)
        assert len(changed) == 1
        answered = [one for one in pair.relay.answers if all(part in one for part in PAYLOAD)]
        assert len(answered) == (2 if what in ("status", "no proof") else 1)
    finally:
        pair.close()


def test_a_recorded_fetch_reads_nothing() -> None:
    pair = RelayedPair(TRUST)
    try:
        pair.admit(1, (0,))
        assert pair.write(1, (0,), pair.fill((0,))) is None
        fetches = [one for one in pair.relay.requests if re.match(rb"GET [^? ]*/\d+ ", one)]
        assert fetches
        for one in fetches:
            assert (
                status_of(
                    send(pair.relay._upstream, one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), shuts=False)
                )
                == 401
            )
        assert not any(b"Bearer" in one for one in pair.relay.requests)
        pair.bytes[:] = CANARY
        pair.expect()
    finally:
        pair.close()
