"""Strangers at ``ranks_port``: they get nothing, and keep no host of the engine from its embeddings."""

from __future__ import annotations

import secrets
import socket
import ssl
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest

from embferry import GatherSink, Geometry, ReceiveManager, TcpTransport
from embferry.connectors.vllm import other_hosts
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.host_claims import slices
from embferry.trust.greeting import Channel, Greeting, Role
from embferry.trust.keys import Key, write_file

from ..pair import GUARD_S, SHAPE, Encode, rows_like, until
from .builders import HIDDEN, Engine, There

pytestmark = pytest.mark.integration

CONNECTIONS = 500
MOST_BYTES = 64 << 20
"""Bytes of an endless stream that the buffers of both kernels may take before the connection ends."""


@pytest.fixture
def config(config: ConnectorConfig, tmp_path: Path) -> ConnectorConfig:
    """The settings of all fixtures, with a cluster key."""
    return with_key(config, tmp_path / "key")


def with_key(config: ConnectorConfig, file: Path) -> ConnectorConfig:
    """Returns the settings with a new cluster key."""
    write_file(file, (Key.new(),), replace=False)
    return msgspec.structs.replace(config, cluster_key_file=str(file))


def greeting() -> bytes:
    return Greeting(Role.DIALER, Channel.CONTROL, [Key.new()], secrets.token_bytes(32)).hello


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


FIRST_BYTES = {
    "silence": b"",
    "garbage": bytes(range(256)) * 16,
    "half a greeting": greeting()[:20],
    "a greeting without a proof": greeting(),
    "a greeting with a wrong proof": greeting() + bytes(range(64)),
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": client_hello(),
}


def fetches(encode: Encode, engine: Engine, there: There, name: str, seed: int) -> bool:
    """Returns whether the other host has an embedding in the end."""
    encode.publish(name, seed)
    return there.has(engine.room(engine.fetch(name, name, encode.offer(name))), rows_like(seed))


@pytest.mark.parametrize("first", FIRST_BYTES.values(), ids=FIRST_BYTES)
def test_connections_of_strangers_keep_no_host_out(
    encode: Encode, engine: Engine, config: ConnectorConfig, first: bytes
) -> None:
    def connect(stack: ExitStack) -> None:
        for _ in range(CONNECTIONS):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", config.ranks_port or 0), GUARD_S))
            sock.send(first)

    with ExitStack() as stack:
        connect(stack)
        there = stack.enter_context(closing(There(config)))
        assert fetches(encode, engine, there, "a", 0)
        connect(stack)
        assert fetches(encode, engine, there, "b", 1)
    assert engine.manager.fault is None


def test_endless_bytes_of_a_stranger_are_not_read(encode: Encode, engine: Engine, config: ConnectorConfig) -> None:
    for first in FIRST_BYTES.values():
        with socket.create_connection(("127.0.0.1", config.ranks_port or 0), GUARD_S) as sock:
            sock.sendall(first)
            with pytest.raises(ConnectionError):
                sock.sendall(bytes(MOST_BYTES))
    with closing(There(config)) as there:
        assert fetches(encode, engine, there, "a", 0)


def test_a_host_with_another_cluster_key_gets_nothing(
    encode: Encode, engine: Engine, config: ConnectorConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says why in its log."""
    with closing(There(with_key(config, tmp_path / "other"))) as other, closing(There(config)) as there:
        until(lambda: "another cluster key than this end" in caplog.text)
        assert fetches(encode, engine, there, "a", 0)
        assert other.kept == 0


def test_claims_of_another_program_of_the_cluster_keep_no_host_out(
    encode: Encode, engine: Engine, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the key, and asks for more rooms than are remembered."""
    monkeypatch.setattr(other_hosts, "HOST_S", GUARD_S)  # a busy machine takes its time for so many claims
    layout, endpoint = slices(HIDDEN, SHAPE.dtype), f"tcp://127.0.0.1:{config.ranks_port}"
    with (
        closing(There(config)) as there,
        closing(
            ReceiveManager(
                Geometry(layout, 4, 8), [TcpTransport(host="127.0.0.1", trust=config.trust)], trust=config.trust
            )
        ) as program,
    ):
        rooms = [program.open(room, endpoint, GatherSink(), name=f"vllm-host-1-{room:064x}") for room in range(3000)]
        for receiver in rooms:
            receiver.init()
        until(lambda: engine.manager.parked.nbytes > 0 and len(engine.manager.parked) == 1024)
        for seed, name in enumerate("abc"):
            assert fetches(encode, engine, there, name, seed)
        assert all(receiver.total_embedding_length == -1 for receiver in rooms)
