"""The variables of the environment that the plug-in reads."""

from __future__ import annotations

import pytest

from embferry import LocalProtocolError
from embferry.connectors.sglang.settings import is_switched_on, read


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"EMBFERRY_SGLANG": "1"}, True),
        ({"EMBFERRY_SGLANG": "true"}, True),
        ({"EMBFERRY_SGLANG": "0"}, False),
        ({"SGLANG_PLUGINS": "other, embferry"}, True),
        ({"SGLANG_PLUGINS": "other"}, False),
        ({"SGLANG_PLUGINS": "embferry", "EMBFERRY_SGLANG": "0"}, False),
    ],
)
def test_the_switch(environment: dict[str, str], on: bool) -> None:
    assert is_switched_on(environment) is on


def test_a_switch_with_another_value_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="EMBFERRY_SGLANG is 1 or 0, not 'maybe'"):
        is_switched_on({"EMBFERRY_SGLANG": "maybe"})


def test_settings_are_read() -> None:
    settings = read(
        {
            "EMBFERRY_SGLANG": "1",
            "EMBFERRY_SGLANG_TRANSPORTS": "tcp, http",
            "EMBFERRY_SGLANG_NUM_BLOCKS": "4",
            "EMBFERRY_SGLANG_ENCODER_TIMEOUT": "0.5",
            "EMBFERRY_SGLANG_METRICS_PORT": "9100",
            "HOME": "/nowhere",
        }
    )
    assert settings.transports == ("tcp", "http")
    assert (settings.num_blocks, settings.block_size, settings.metrics_port) == (4, 16, 9100)
    assert settings.receiving.answer_timeout == settings.receiving.peer_timeout == 0.5
    assert settings.sending.bootstrap_timeout == settings.receiving.bootstrap_timeout == settings.encode_timeout


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("NUM_BLOCK", "4", "EMBFERRY_SGLANG_NUM_BLOCK is no variable .* there are .*EMBFERRY_SGLANG_NUM_BLOCKS,"),
        ("NUM_BLOCKS", "0", "EMBFERRY_SGLANG_NUM_BLOCKS='0' is wrong: Expected `int` >= 1"),
        ("NUM_BLOCKS", "many", "EMBFERRY_SGLANG_NUM_BLOCKS='many' is wrong: Expected `int`"),
        ("ENCODER_TIMEOUT", "-1", "`float` > 0"),
        ("ENCODER_TIMEOUT", "inf", "<= 31536000"),
        ("ADVERTISE", "", "length >= 1"),
        ("VIDEO_RATE", "real", "'real'"),
        ("METRICS_PORT", "70000", "<= 65535"),
        ("TRANSPORTS", "tcp,pigeon", r"not \['pigeon'\]"),
        ("TRANSPORTS", "", r"not \[\]"),
        ("HOST", "0.0.0.0", "cluster key"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("EMBFERRY_CLUSTER_KEY", "EMBFERRY_CLUSTER_KEY_FILE", "EMBFERRY_INSECURE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(LocalProtocolError, match=why):
        read({f"EMBFERRY_SGLANG_{name}": value})
