"""Settings that the commands accept or refuse with ``--wire origin``."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.serve.config import SecuritySettings, Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.origin.process import check_origin

BF16 = {"dtype": "bf16", "wire": "origin"}


@pytest.mark.parametrize("verb", ["encode", "language"])
def test_another_number_format_ends_with_status_2_before_anything_is_loaded(verb: str) -> None:
    outcome = CliRunner().invoke(app, [verb, "--wire", "origin"])
    assert outcome.exit_code == 2
    assert "set --dtype bf16" in outcome.stderr


@pytest.mark.parametrize("verb", ["serve", "router"])
def test_our_router_does_not_work_with_such_workers(verb: str) -> None:
    outcome = CliRunner().invoke(app, [verb, "--wire", "origin"])
    assert outcome.exit_code == 2
    assert "SGLang's load balancer" in outcome.stderr


@pytest.mark.parametrize("verb", ["encode", "language"])
def test_a_missing_package_is_named(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mooncake" else object())
    outcome = CliRunner().invoke(app, [verb, "--wire", "origin", "--dtype", "bf16"])
    assert outcome.exit_code == 2
    assert "pip install 'embferry[mooncake]'" in outcome.stderr


def test_strangers_are_let_in_only_if_told_to_and_tls_is_refused() -> None:
    check_origin(Settings(**BF16))
    check_origin(Settings(**BF16, host="10.0.0.5", security=SecuritySettings(insecure=True)))
    with pytest.raises(ConfigError, match="--insecure"):
        check_origin(Settings(**BF16, host="10.0.0.5"))
    with pytest.raises(ConfigError, match="TLS"):
        check_origin(Settings(**BF16, security=SecuritySettings(tls_cert="/c.pem")))
