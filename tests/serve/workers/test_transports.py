"""The transports of a worker: their selection, their order, and the errors for missing ones."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embferry.protocol.errors import TransportError
from embferry.serve.config import Settings, TransferSettings
from embferry.serve.config_load import ConfigError
from embferry.serve.supervisor import run
from embferry.serve.worker import transports as under_test
from embferry.transports.contract import Transport
from embferry.transports.registry import TRANSPORTS

MISSING = TransportError("NIXL is not installed; pip install 'embferry[nixl]'", retryable=False)
ELSEWHERE = "192.0.2.7"  # RFC 5737
Make = Callable[[Settings], list[str]]


def settings_for(*names: str, **rest: Any) -> Settings:
    transfer = TransferSettings(transports=names) if names else TransferSettings()
    return Settings(transfer=transfer, **rest)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a function from settings to the names of the transports, on a machine that has all but NIXL."""

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    def make(name: str, settings: Settings) -> Named:
        if name == "nixl":
            raise MISSING
        return Named(name)

    monkeypatch.setattr(under_test, "make", make)
    return lambda settings: [transport.name for transport in under_test.make_transports(settings)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_auto_selects_shm_and_tcp_on_a_loopback_address(chosen: Make, host: str) -> None:
    assert chosen(settings_for(host=host)) == ["shm", "tcp"]
    assert chosen(settings_for(host="0.0.0.0", advertise_host=host)) == ["shm", "tcp"]


def test_auto_selects_every_available_transport_on_other_addresses(
    chosen: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(settings_for(host="0.0.0.0", advertise_host=ELSEWHERE)) == ["shm", "mooncake", "tcp", "http"]
    assert "nixl is not available: [transport_error] NIXL is not installed" in caplog.text
    assert "transports: shm, mooncake, tcp, http" in caplog.text


def test_named_transports_keep_their_order(chosen: Make) -> None:
    assert chosen(settings_for("tcp", "mooncake", "shm")) == ["tcp", "mooncake", "shm"]


def test_a_missing_named_transport_is_refused_with_the_install_command(chosen: Make) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen(settings_for("shm", "nixl"))
    assert refused.value.problems == [f"--transfer-transports: nixl: {MISSING}"]


def test_a_missing_transport_ends_serve_before_any_process_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(SystemExit) as ended:
        run(settings_for("tcp", "mooncake"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("embferry: --transfer-transports: mooncake: [transport_error] ")
    assert "pip install 'embferry[mooncake]'" in line
    assert "libibverbs1" in line


@pytest.fixture
def made() -> Iterator[Callable[..., Transport]]:
    transports: list[Transport] = []

    def make(name: str, **transfer: Any) -> Transport:
        settings = Settings(advertise_host=ELSEWHERE, transfer=TransferSettings(**transfer))
        transports.append(under_test.make(name, settings))
        return transports[-1]

    yield make
    for transport in transports:
        transport.close()


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if name not in ("nixl", "mooncake")])
def test_a_transport_is_created_by_its_name(made: Callable[..., Transport], name: str) -> None:
    assert made(name).name == name


def test_the_http_transport_gets_port_address_and_proxy(made: Callable[..., Any]) -> None:
    transport = made(
        "http", http_port=8901, http_advertise="http://192.0.2.8:80/embeddings", http_proxy="http://192.0.2.9:3128"
    )
    assert (transport._host, transport._port, transport._advertise) == (
        "127.0.0.1",
        8901,
        "http://192.0.2.8:80/embeddings",
    )
    assert made("http")._advertise == ELSEWHERE


@pytest.mark.integration
@pytest.mark.engines
def test_nixl_and_mooncake_get_their_settings(made: Callable[..., Any]) -> None:
    nixl = made("nixl", nixl_backends={"UCX": {"num_workers": "2"}})
    assert nixl._backends == {"UCX": {"num_workers": "2"}}
    assert nixl._advertise == ELSEWHERE
    mooncake = made("mooncake", mooncake_device="mlx5_0")
    assert mooncake._settings.device == "mlx5_0"
    assert mooncake._settings.host == ELSEWHERE


@pytest.mark.integration
@pytest.mark.engines
def test_an_engine_that_cannot_start_with_its_settings_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    transfer = TransferSettings(transports=("tcp", "mooncake"), mooncake_protocol="rdma")
    (problem,) = under_test.unusable(Settings(transfer=transfer))
    assert problem.startswith("--transfer-transports: mooncake: [transport_error] MC_FORCE_TCP is set")
