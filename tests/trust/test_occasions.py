"""One log line a minute of what clients can cause without limit, and a process that says which one it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embferry.trust import ClusterKeys
from embferry.trust.keys import Key, write_file
from embferry.trust.occasions import REPORT_S, Occasions, more


def test_one_a_minute_of_each_kind_is_told_with_the_number_of_the_others() -> None:
    now = 0.0
    occasions = Occasions(lambda: now)
    assert [occasions.count("a") for _ in range(4)] == [0, None, None, None]
    assert occasions.count("b") == 0
    now = REPORT_S - 0.5
    assert occasions.count("a") is None
    now = REPORT_S
    assert [occasions.count("a"), occasions.count("a")] == [4, None]
    assert (more(0), more(1_200)) == ("", " (1,200 more since the last such line)")


def test_a_key_that_is_read_again_names_the_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every process of a machine does so, and their lines share one log."""
    caplog.set_level("INFO", "embferry.trust")
    file = tmp_path / "key"
    write_file(file, (Key.new(),), replace=False)
    keys = ClusterKeys.of_file(file)
    write_file(file, (Key.new(), *keys.accepted()), replace=True)
    keys.accepted()
    assert caplog.messages == [f"process {os.getpid()} has read the cluster keys in {file} again"]
