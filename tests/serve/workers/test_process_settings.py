"""Settings, addresses and ports of the processes, tested without processes."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from embferry.memory import limits
from embferry.memory.limits import machine_memory_bytes
from embferry.protocol.errors import TransportError
from embferry.serve.config import EncodeSettings, RouterSettings, Settings, TransferSettings
from embferry.serve.config_load import ConfigError
from embferry.serve.http.address import address_of, url_of
from embferry.serve.http.serving import listen
from embferry.serve.supervisor import LocalCluster
from embferry.serve.supervisor.handover import pack, read_line, unpack
from embferry.serve.worker.process import open_port
from embferry.serve.worker.transfer_settings import control_limits, encode_timeouts, language_timeouts


def test_a_child_receives_all_settings_and_the_api_key() -> None:
    settings = Settings(
        model="shapes",
        router=RouterSettings(api_key=SecretStr("s3cret"), port=0),
        transfer=TransferSettings(transports=("tcp",), num_blocks=3),
    )
    reader, writer = os.pipe()
    try:
        os.write(writer, pack(settings))
        arrived = unpack(read_line(reader))
        assert arrived == settings
        assert arrived.router.api_key is not None
        assert arrived.router.api_key.get_secret_value() == "s3cret"
        os.write(writer, b"half a li")
        os.close(writer)
        with pytest.raises(EOFError):
            read_line(reader)
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("host", "advertised", "router", "workers"),
    [
        ("0.0.0.0", None, ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")),
        ("0.0.0.0", "10.0.0.7", ("0.0.0.0", "10.0.0.7"), ("0.0.0.0", "10.0.0.7")),
        ("127.0.0.1", None, ("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")),
    ],
)
def test_only_the_router_of_a_cluster_listens_on_every_address(
    host: str, advertised: str | None, router: tuple[str, str], workers: tuple[str, str]
) -> None:
    cluster = LocalCluster(Settings(host=host, advertise_host=advertised))
    for role, expected in (("router", router), ("encode", workers), ("language", workers), ("bootstrap", workers)):
        settings = cluster.settings_of(role)
        assert (settings.host, settings.reachable_host) == expected


def test_each_worker_of_a_cluster_has_its_own_ports() -> None:
    cluster = LocalCluster(Settings(encode=EncodeSettings(port=9000), transfer=TransferSettings(http_port=9100)))
    settings = [cluster.settings_of("encode", number) for number in range(2)]
    assert [(one.encode.port, one.transfer.http_port) for one in settings] == [(9000, 9100), (9001, 9101)]
    assert cluster.settings_of("language", 1).language.port == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no-such-host.invalid"])
def test_a_worker_refuses_an_unreachable_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_INSECURE", "1")  # otherwise the lack of a key is what it says
    with pytest.raises(ConfigError, match=r"--(advertise-)?host"):
        open_port(Settings(host=host), 0)


def test_the_error_of_a_taken_port_names_it_and_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{port}: .*--encode-port"):
            open_port(Settings(), port, "--encode-port")


@pytest.mark.integration
def test_processes_without_a_model_do_not_load_torch() -> None:
    """Torch costs seconds of start-up and half a gigabyte of memory."""
    look = "import sys, embferry.serve.supervisor.child, embferry.serve.router.app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout == "False\n"


def test_urls_for_ipv4_and_ipv6() -> None:
    with open_port(Settings(), 0) as listener:
        port = listener.getsockname()[1]
        assert url_of("127.0.0.1", listener) == f"http://127.0.0.1:{port}"
        assert url_of("::1", listener) == f"http://[::1]:{port}"


def test_time_outs_follow_the_settings() -> None:
    transfer = TransferSettings(heartbeat_interval=0.05, heartbeat_max_failures=3, drain_timeout=1, waiting_timeout=7)
    settings = Settings(transfer=transfer, encode=EncodeSettings(unclaimed_timeout=9))
    receiving, sending = language_timeouts(settings), encode_timeouts(settings)
    assert receiving.peer_timeout == pytest.approx(0.15)
    assert receiving.retry_interval == receiving.retry_limit == 0.05
    assert (receiving.drain_timeout, receiving.waiting_timeout) == (1, 7)
    assert (sending.bootstrap_timeout, sending.lease_timeout) == (9, 9)


def test_the_bounds_follow_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    transfer = TransferSettings(
        answer_timeout=3,
        max_embedding_bytes=1 << 20,
        parked_requests=7,
        parked_bytes=8,
        control_connections=9,
        control_connections_per_address=5,
        control_unsent_bytes=11,
        control_unsent_bytes_per_peer=10,
        control_connect_timeout=2,
    )
    settings = Settings(transfer=transfer)
    receiving, sending, control = language_timeouts(settings), encode_timeouts(settings), control_limits(settings)
    assert (receiving.answer_timeout, receiving.max_embedding_bytes) == (3, 1 << 20)
    assert (sending.parked_requests, sending.parked_bytes) == (7, 8)
    assert (control.connections, control.connections_per_address, control.connect_timeout) == (9, 5, 2)
    assert (control.unsent_bytes, control.unsent_bytes_per_peer) == (11, 10)
    assert control_limits(Settings()).connections == 1024  # a quarter of the open files


def test_the_largest_embedding_is_bounded_by_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = machine_memory_bytes()
    assert language_timeouts(Settings()).max_embedding_bytes == min(16 << 30, machine)
    container = tmp_path / "memory.max"
    monkeypatch.setattr(limits, "CGROUP_LIMIT", container)
    container.write_text("max\n")
    assert machine_memory_bytes() >= machine
    container.write_text(f"{1 << 30}\n")
    assert language_timeouts(Settings()).max_embedding_bytes == 1 << 30


NAMES = {
    "v6.test": ["::1"],
    "both.test": ["::1", "127.0.0.1"],
    "lost.test": ["192.0.2.99", "::1"],
    "far.test": ["2001:db8::1", "192.0.2.99"],
}
"""Names and their addresses; this machine has none of the documentation's."""


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("v6.test", "::1"),
        ("both.test", "127.0.0.1"),
        ("lost.test", "::1"),
        ("far.test", "192.0.2.99"),
        ("[::1]", "::1"),
    ],
)
def test_a_name_stands_for_an_address_that_this_machine_has(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str
) -> None:
    system = socket.getaddrinfo

    def lookup(name: str, *more: Any, **options: Any) -> list[Any]:
        return [entry for one in NAMES.get(name, [name]) for entry in system(one, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert address_of(host) == address
    if host != "far.test":
        with listen(host, 0) as listener:
            assert listener.getsockname()[0] == address
