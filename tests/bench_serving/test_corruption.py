"""What is done to bytes on their way, over real sockets."""

from __future__ import annotations

import json
import socket
import struct
import threading
from pathlib import Path

import httpx
import pytest

from embferry.bench.serving.corruption import DAMAGE_EVERY, TCP_HANDLE, FlippedBits, ZeroedTails
from embferry.bench.serving.gate import Gate
from embferry.bench.serving.relay import Relay
from embferry.transports.tcp.transport import TcpHandle

from . import stub

pytestmark = pytest.mark.integration


class Sink:
    """Takes one connection, and keeps what comes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.port: int = self._listener.getsockname()[1]
        self.got = b""
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def whole(self) -> bytes:
        """All of it, once the connection has ended."""
        self._thread.join()
        self._listener.close()
        return self.got

    def _take(self) -> None:
        with self._listener.accept()[0] as sock:
            sock.settimeout(10)
            while data := sock.recv(1 << 16):
                self.got += data


def sent(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


def handle(port: int) -> bytes:
    """As a receiver sends it, within a message."""
    import msgspec

    return b"before" + msgspec.msgpack.encode(TcpHandle("127.0.0.1", port, bytes(16))) + b"after"


def test_a_relay_passes_on_what_its_change_makes() -> None:
    sink = Sink()
    with Relay(sink.port, bytes.upper) as relay:
        sent(relay.port, b"abc" * 1000)
        assert sink.whole() == b"ABC" * 1000


def test_a_relay_without_anybody_behind_it_hangs_up() -> None:
    sink = Sink()
    sent(sink.port, b"")
    sink.whole()
    with Relay(sink.port, bytes) as relay, socket.create_connection(("127.0.0.1", relay.port), 10) as sock:
        assert sock.recv(1) == b""


def test_bits_flip_on_the_way_that_a_receiver_named() -> None:
    data, control = Sink(), Sink()
    entry = {"embferry": {"endpoint": f"tcp://127.0.0.1:{control.port}", "room": 7}, "metadata": {"grid": [1]}}
    with FlippedBits() as flipped:
        (changed,) = flipped.change({"hash": entry}).values()
        assert changed["metadata"] == {"grid": [1]}
        assert changed["embferry"]["room"] == 7
        sent(int(changed["embferry"]["endpoint"].rpartition(":")[2]), handle(data.port))
        named = control.whole()
        assert len(named) == len(handle(data.port))
        (port,) = struct.unpack_from(">H", named, named.index(TCP_HANDLE) + len(TCP_HANDLE) + 11)
        assert port != data.port
        assert named == handle(port)
        sent(port, bytes(3 * DAMAGE_EVERY))
        got = data.whole()
        assert len(got) == 3 * DAMAGE_EVERY
        assert 2 <= flipped.done == sum(byte != 0 for byte in got) <= 3


def test_messages_without_a_handle_and_entries_without_coordinates_stay() -> None:
    control = Sink()
    with FlippedBits() as flipped:
        assert flipped.change({"hash": {"embferry_refused": {"code": "capacity"}}})["hash"] == {
            "embferry_refused": {"code": "capacity"}
        }
        entry = {"embferry": {"endpoint": f"tcp://127.0.0.1:{control.port}"}}
        endpoint = flipped.change({"hash": entry})["hash"]["embferry"]["endpoint"]
        sent(int(endpoint.rpartition(":")[2]), b"no handle" + TCP_HANDLE)
        assert control.whole() == b"no handle" + TCP_HANDLE
        assert flipped.done == 0


def test_the_tail_of_a_file_is_zeroed(tmp_path: Path) -> None:
    file = tmp_path / "hash" / "encoder_cache.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"x" * DAMAGE_EVERY)
    small = tmp_path / "small" / "encoder_cache.safetensors"
    small.parent.mkdir()
    small.write_bytes(b"x" * 10)
    with ZeroedTails(tmp_path) as zeroed:
        assert zeroed.change({"hash": {"metadata": 1}, "small": {}}) == {"hash": {"metadata": 1}, "small": {}}
    assert file.read_bytes() == b"x" * (DAMAGE_EVERY * 3 // 4) + bytes(DAMAGE_EVERY // 4)
    assert small.read_bytes() == b"x" * 10
    assert zeroed.done == 1


def test_a_gate_changes_what_an_encoder_answers_and_nothing_else() -> None:
    def answer(exchange: stub.Exchange) -> None:
        if exchange.pictures:
            exchange.refuse(200, json.dumps({"id": "1", "ec_transfer_params": {"hash": {"room": 1}}}))
        else:
            exchange.refuse(503, json.dumps({"error": {"message": "no"}}))

    def body(*kinds: str) -> dict[str, object]:
        return {"messages": [{"content": [{"type": kind} for kind in kinds]}]}

    with (
        stub.serving(answer, {"/health": "ok"}) as url,
        Gate(url, lambda params: {key: entry | {"room": 2} for key, entry in params.items()}) as gate,
        httpx.Client(timeout=10, trust_env=False) as client,
    ):
        assert client.get(f"{gate.url}/health").text == "ok"
        assert client.get(f"{gate.url}/nothing").status_code == 404
        chat = f"{gate.url}/v1/chat/completions"
        answered = client.post(chat, json=body("image_url"))
        assert answered.json() == {"id": "1", "ec_transfer_params": {"hash": {"room": 2}}}
        refused = client.post(chat, json=body("text"))
        assert (refused.status_code, refused.json()) == (503, {"error": {"message": "no"}})


def test_a_gate_before_nobody_hangs_up() -> None:
    with stub.serving(stub.Exchange.hang) as url:
        pass
    with Gate(url, dict) as gate, pytest.raises(httpx.HTTPError):
        httpx.get(f"{gate.url}/health", timeout=10, trust_env=False)
