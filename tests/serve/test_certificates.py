"""``embferry keys ca`` and ``cert``: files that the settings take, and errors that name a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.protocol.errors import LocalProtocolError, TlsFailed
from embferry.trust import Trust
from embferry.trust.trust import TLS_ENV, TLS_HOSTS_ENV, TLS_REQUIRED_ENV


def called(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["keys", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The variables of a part whose files the commands have made."""
    ca = tmp_path / "ca"
    assert called("ca", ca)[0] == 0
    assert called("cert", "part", "--ca", ca, "--host", "10.0.0.7", "--host", "part.lan", "--days", 30)[0] == 0
    return dict(zip(TLS_ENV, (str(ca / name) for name in ("ca.pem", "part.pem", "part.key")), strict=True))


def test_the_commands_make_what_a_part_needs(environ: dict[str, str]) -> None:
    trust = Trust.of_environment(environ)
    assert trust.demands_tls
    assert trust.scheme == "https"
    for host in ("10.0.0.7", "part.lan"):
        trust.check_host(host, "the part")
    with pytest.raises(TlsFailed, match=r"embferry keys cert NAME --ca DIR --host 10\.0\.0\.8"):
        trust.check_host("10.0.0.8", "the part")
    assert not Trust.of_environment(environ | {TLS_REQUIRED_ENV: "0"}).demands_tls
    Trust.of_environment(environ | {TLS_HOSTS_ENV: "0"}).check_host("10.0.0.8", "the part")


def test_a_part_of_the_files_is_not_enough(environ: dict[str, str]) -> None:
    for name in TLS_ENV:
        with pytest.raises(LocalProtocolError, match=f"{name} is not set"):
            Trust.of_environment(environ | {name: ""})
    assert Trust.of_environment({}).tls is None
    with pytest.raises(LocalProtocolError, match=f"{TLS_ENV[0]} and {TLS_ENV[2]} are not set"):
        Trust.of_environment(environ | {TLS_ENV[0]: "", TLS_ENV[2]: ""})


def test_nothing_is_overwritten(environ: dict[str, str], tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    for arguments in (("ca", ca), ("cert", "part", "--ca", ca, "--host", "h")):
        status, said = called(*arguments)
        assert status == 1
        assert "is there already" in said


def test_a_ca_that_is_absent_is_named(tmp_path: Path) -> None:
    status, said = called("cert", "part", "--ca", tmp_path / "none", "--host", "h")
    assert status == 1
    assert "ca.pem cannot be read" in said
