"""Ports are asked for before any process starts: each problem is one sentence that names the option."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from embferry.serve.config import (
    BootstrapSettings,
    EncodeSettings,
    LanguageSettings,
    RouterSettings,
    ServeSettings,
    Settings,
    TransferSettings,
)
from embferry.serve.supervisor import LocalCluster, ports
from embferry.serve.supervisor.serve import run


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


FREE = Settings(router=RouterSettings(port=0), bootstrap=BootstrapSettings(port=0))


def found(**sections: object) -> list[str]:
    settings = FREE.model_copy(update=sections)
    return ports.problems(settings, LocalCluster(settings).wanted_ports())


def test_free_ports_are_no_problem() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bootstrap", "--bootstrap-port"), ("router", "--router-port"), ("encode", "--encode-port"),
        ("language", "--language-port"), ("transfer", "--transfer-http-port"),
    ],
)  # fmt: skip
def test_a_port_that_is_taken_is_named_with_its_process_and_option(name: str, option: str, taken: int) -> None:
    sections = {
        "bootstrap": BootstrapSettings(port=taken), "router": RouterSettings(port=taken),
        "encode": EncodeSettings(port=taken), "language": LanguageSettings(port=taken),
        "transfer": TransferSettings(http_port=taken, transports=("http",)),
    }  # fmt: skip
    (sentence,) = found(**{name: sections[name]})
    assert sentence.startswith(f"port {taken} of ")
    assert sentence.endswith(f"choose another with {option} (0 takes a free one)")


def test_the_name_is_the_one_that_the_user_has_given(taken: int) -> None:
    settings = FREE.model_copy(update={"router": RouterSettings(port=taken)}).with_places({"router.port": "--port"})
    (sentence,) = ports.problems(settings, LocalCluster(settings).wanted_ports())
    assert "with --port (0" in sentence


def test_each_of_several_workers_has_its_own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_bind", lambda address, port: errno.EADDRINUSE if port == 9001 else 0)
    (sentence,) = found(language=LanguageSettings(port=9000), serve=ServeSettings(language_workers=2))
    assert sentence.startswith("port 9001 of language-1 is taken")


def test_two_processes_that_want_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_bind", lambda address, port: 0)
    port = 9000
    (sentence,) = found(bootstrap=BootstrapSettings(port=port), router=RouterSettings(port=port))
    assert sentence == (
        f"the bootstrap server (--bootstrap-port) and the router (--router-port) want the same port {port}"
    )


def test_an_address_of_another_machine_and_a_name_without_one() -> None:
    (sentence,) = found(host="192.0.2.1")  # for documentation alone (RFC 5737)
    assert sentence.startswith("--host 192.0.2.1: this machine has no such address")
    (sentence,) = found(host="no-such-host.invalid")
    assert sentence.startswith("--host no-such-host.invalid has no address: ")


def test_a_port_for_root_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_bind", lambda address, port: errno.EACCES if port == 80 else 0)
    (sentence,) = found(router=RouterSettings(port=80))
    assert sentence == "port 80 of the router is for root alone; choose one of 1024 or more with --router-port"


def test_nothing_is_started_when_a_port_is_taken(
    taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalCluster, "start", lambda self: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as ended:
        run(FREE.model_copy(update={"router": RouterSettings(port=taken)}))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"embferry: port {taken} of the router is taken")
