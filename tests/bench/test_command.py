"""The command without measuring anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.bench import results
from embferry.cli.main import app
from tests.bench import made


def called(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    outcome = CliRunner().invoke(app, ["bench", "transfer", *map(str, words)])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


def test_earlier_results_are_shown_and_one_that_failed_ends_with_1(tmp_path: Path) -> None:
    results.save(made.everything(), tmp_path / "results.json")
    status, out, err = called("--show", tmp_path / "results.json", "--markdown", tmp_path / "tables.md")
    assert status == 1
    assert "failed: NIXL (UCX), directly, 67 MB: receiver: killed by SIGSEGV" in err
    assert "MISSING: safetensors is not installed: pip install <it>" in out
    assert (tmp_path / "index.html").read_text().startswith("<!doctype html>")
    assert "### Where it has to be" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--payload", "many"], "'many' is not a size"),
        (["--only", "carrier-pigeon"], "nobody is called 'carrier-pigeon'; there are copy/private"),
        (["--show", "no-such-file.json"], "no-such-file.json"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_usage_ends_with_2_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = called(*words)
    assert status == 2
    assert why in err


def test_a_document_without_a_place_for_results_is_left_alone(tmp_path: Path) -> None:
    results.save(made.results(made.measured("socket", 0.1)), tmp_path / "results.json")
    (tmp_path / "mine.md").write_text("mine\n")
    status, _, err = called("--show", tmp_path / "results.json", "--markdown", tmp_path / "mine.md")
    assert status == 2
    assert "no place for results" in err
    assert (tmp_path / "mine.md").read_text() == "mine\n"
