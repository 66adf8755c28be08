"""The cluster key: its texts, its file, and that it is never shown."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import pickle
import stat
import traceback
from pathlib import Path

import pytest

from embferry.protocol.errors import LocalProtocolError
from embferry.trust import ClusterKeys, Key, Trust
from embferry.trust.keys import write_file
from embferry.trust.reread import REPORT_S
from embferry.trust.trust import KEY_ENV

OLD, NEW, OTHER = (Key(bytes([number]) * 32) for number in (1, 2, 3))


def key_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_file_holds_the_current_key_first(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", f"# both\n\n{NEW.written()} # current\n  {OLD.written().upper()}\n")
    keys = ClusterKeys.of_file(path)
    assert keys.current() == NEW
    assert keys.accepted() == (NEW, OLD)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("{new}", (NEW,)),
        ("{new}\n", (NEW,)),
        ("{new}, {old}", (NEW, OLD)),
        ("# a comment, with a comma\n{new}\r\n\n  {old} # previous\n", (NEW, OLD)),
    ],
)
def test_a_file_and_a_variable_take_the_same_text(tmp_path: Path, form: str, expected: tuple[Key, ...]) -> None:
    text = form.format(new=NEW.written(), old=OLD.written())
    assert ClusterKeys.of_text(text).accepted() == expected
    assert ClusterKeys.of_file(key_file(tmp_path / "key", text)).accepted() == expected


@pytest.mark.parametrize("keys", [(NEW,), (NEW, OLD)])
def test_a_variable_takes_the_content_of_a_key_file(tmp_path: Path, keys: tuple[Key, ...]) -> None:
    write_file(tmp_path / "key", keys, replace=False)
    content = (tmp_path / "key").read_text("ascii")
    found = Trust.of_environment({KEY_ENV: content}).keys
    assert found is not None
    assert found.accepted() == keys


@pytest.mark.parametrize(
    "text",
    ["", "# nothing", OLD.written()[:-1], OLD.written() + "0", "g" * 64, "0x" + "1" * 62, "\n".join(["1" * 64] * 3)],
)
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(LocalProtocolError) as of_file:
        ClusterKeys.of_file(key_file(tmp_path / "key", text))
    with pytest.raises(LocalProtocolError) as of_text:
        ClusterKeys.of_text(text.replace("\n", ","))
    for error in (of_file.value, of_text.value):
        assert len(text) < 60 or text.strip() not in str(error)
        assert text[:60] not in "".join(traceback.format_exception(error)) or len(text) < 60


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644, 0o601])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "key", NEW.written())
    path.chmod(mode)
    with pytest.raises(LocalProtocolError, match="chmod 600"):
        ClusterKeys.of_file(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(LocalProtocolError, match="the cluster key file"):
            ClusterKeys.of_file(path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_file(path, (OLD,), replace=False)
    keys = ClusterKeys.of_file(path)
    assert keys.accepted() == (OLD,)
    write_file(path, (NEW, OLD), replace=True)
    assert keys.accepted() == (NEW, OLD)
    write_file(path, (NEW,), replace=True)
    assert keys.accepted() == (NEW,)


def test_a_file_that_breaks_keeps_the_last_keys_and_is_logged_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "key"
    write_file(path, (OLD,), replace=False)
    keys = ClusterKeys.of_file(path)
    now = [100.0]
    assert keys._file is not None
    keys._file.clock = lambda: now[0]
    with caplog.at_level(logging.INFO):
        path.unlink()
        assert keys.current() == OLD
        key_file(path, "no key\n")
        assert keys.current() == OLD
        key_file(path, NEW.written()).chmod(0o644)
        assert keys.current() == OLD
        assert len(caplog.records) == 1
        now[0] += REPORT_S
        assert keys.current() == OLD
        assert len(caplog.records) == 2
        path.chmod(0o600)
        assert keys.current() == NEW
    assert NEW.written() not in caplog.text
    assert OLD.written() not in caplog.text


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_file(path, (NEW, OLD), replace=False)
    for keys in (ClusterKeys(NEW, OLD), ClusterKeys.of_file(path)):
        shown = f"{keys} {keys!r} {NEW} {NEW!r} {keys.accepted()}"
        assert NEW.written() not in shown
        assert repr(NEW._secret) not in shown


def test_a_written_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "key"
    before = os.umask(0)
    try:
        write_file(path, (NEW,), replace=False)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        write_file(path, (OTHER, NEW), replace=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ClusterKeys.of_file(path).accepted() == (OTHER, NEW)
    with pytest.raises(LocalProtocolError, match="is there already"):
        write_file(path, (OLD,), replace=False)
    assert [found.name for found in tmp_path.iterdir()] == ["key"]  # no temporary file stays


def test_a_proof_is_an_hmac_over_label_and_parts() -> None:
    message = b"\0\0\0\5label\0\0\0\1a\0\0\0\2bc"
    assert NEW.mac(b"label", b"a", b"bc") == hmac.new(b"\2" * 32, message, hashlib.sha256).digest()
    assert NEW.mac(b"label", b"a", b"bc") != NEW.mac(b"label", b"ab", b"c")
    assert NEW.mac(b"label") != OLD.mac(b"label")
    assert Key.new() != Key.new()


def test_a_key_has_its_length() -> None:
    with pytest.raises(LocalProtocolError, match="31"):
        Key(b"1" * 31)
    with pytest.raises(LocalProtocolError, match="0 cluster keys"):
        ClusterKeys()


def test_a_key_is_not_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(NEW)
