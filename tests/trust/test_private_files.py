"""Files with secrets: those that only their owner may read, and those that root has given to a group."""

from __future__ import annotations

import os
import stat

import pytest

from embferry.trust.private_files import is_private


def status(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 2000, 10, 0, 0, 0))


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
@pytest.mark.parametrize("owner", [0, 1000])
@pytest.mark.parametrize("process", [0, 1000])
def test_a_file_for_its_owner_alone_is_private(
    mode: int, owner: int, process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: process)
    assert is_private(status(mode, owner))


@pytest.mark.parametrize("others", range(1, 0o100))
@pytest.mark.parametrize("owner", [0, 1000, 1001])
@pytest.mark.parametrize("process", [0, 1000])
def test_a_group_may_read_what_root_owns_and_nothing_more(
    others: int, owner: int, process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: process)
    assert is_private(status(0o600 | others, owner)) == (others == 0o040 and owner == 0 and process != 0)
