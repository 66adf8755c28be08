"""Where a part may listen, and what the environment says about it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from embferry.disaggregation.mooncake.zmq_thread import check_listening
from embferry.protocol.errors import LocalProtocolError
from embferry.trust import ClusterKeys, Key, Trust
from embferry.trust.keys import write_file
from embferry.trust.policy import is_loopback

KEY = Key.new()
WITH_KEY, INSECURE = Trust(ClusterKeys(KEY)), Trust(insecure=True)

LOOPBACK = (
    "127.0.0.1",
    "127.8.9.1",
    "::1",
    "[::1]",
    "localhost",
    "LOCALHOST.",
    "::ffff:127.0.0.1",
    "[::ffff:127.0.0.1]",
)
OTHERS = (
    "0.0.0.0", "::", "[::]", "10.0.0.7", "192.0.2.1", "fe80::1%eth0", "::ffff:10.0.0.7", "::ffff:0.0.0.0", "",
    "encode-7", "localhost.example", "127.0.0.1.example", "2001:db8::1",
)  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_address_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    Trust().check_listening(host, "a port")


@pytest.mark.parametrize("host", OTHERS)
def test_every_other_address_needs_one(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(LocalProtocolError, match=r"a port would listen on .*embferry keys new.*--insecure"):
        Trust().check_listening(host, "a port")
    WITH_KEY.check_listening(host, "a port")


def test_a_part_that_is_open_to_strangers_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        INSECURE.check_listening("127.0.0.1", "the control port")
        Trust(WITH_KEY.keys, insecure=True).check_listening("0.0.0.0", "the control port")
        assert not caplog.records
        INSECURE.check_listening("0.0.0.0", "the control port")
    assert "the control port listens on 0.0.0.0 without a cluster key" in caplog.text


def test_the_environment(tmp_path: Path) -> None:
    assert Trust.of_environment({}) == Trust(None, insecure=False)
    assert Trust.of_environment({"EMBFERRY_CLUSTER_KEY": "", "EMBFERRY_INSECURE": ""}) == Trust()
    assert Trust.of_environment({"EMBFERRY_INSECURE": "1"}).insecure
    trust = Trust.of_environment({"EMBFERRY_CLUSTER_KEY": KEY.written()})
    assert trust.keys is not None
    assert trust.keys.current() == KEY
    write_file(tmp_path / "key", (KEY,), replace=False)
    trust = Trust.of_environment({"EMBFERRY_CLUSTER_KEY_FILE": str(tmp_path / "key")})
    assert trust.keys is not None
    assert trust.keys.current() == KEY
    assert KEY.written() not in repr(trust)


def test_the_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_INSECURE", "1")
    assert Trust.or_environment(None) == INSECURE
    assert Trust.or_environment(WITH_KEY) is WITH_KEY


@pytest.mark.parametrize(
    "environ",
    [
        {"EMBFERRY_INSECURE": "perhaps"},
        {"EMBFERRY_CLUSTER_KEY": "secret"},
        {"EMBFERRY_CLUSTER_KEY_FILE": "/nonexistent"},
        {"EMBFERRY_CLUSTER_KEY": KEY.written(), "EMBFERRY_CLUSTER_KEY_FILE": "key"},
    ],
)
def test_a_wrong_environment_is_an_error(environ: dict[str, str]) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        Trust.of_environment(environ)
    assert KEY.written() not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_origins_wire_listens_for_strangers_only_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", KEY.written())  # which its peers do not prove
    check_listening("127.0.0.1")
    with pytest.raises(LocalProtocolError, match="EMBFERRY_INSECURE=1"):
        check_listening("10.0.0.7")
    monkeypatch.setenv("EMBFERRY_INSECURE", "1")
    check_listening("10.0.0.7")
