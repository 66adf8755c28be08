"""``embferry bench transfer`` without measuring anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.bench import results
from embferry.cli.main import app
from tests.bench.transfer import examples


def call(*words: object) -> tuple[int, str, str]:
    """Returns exit status, stdout and stderr."""
    outcome = CliRunner().invoke(app, ["bench", "transfer", *map(str, words)])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


def test_earlier_results_are_shown_and_a_failed_candidate_ends_with_status_1(tmp_path: Path) -> None:
    results.save(examples.everything(), tmp_path / "results.json")
    status, out, err = call("--show", tmp_path / "results.json", "--markdown", tmp_path / "tables.md")
    assert status == 1
    assert "failed: NIXL (UCX), directly, 67 MB: receiver: killed by SIGSEGV" in err
    assert "MISSING: safetensors is not installed: pip install <it>" in out
    assert (tmp_path / "index.html").read_text().startswith("<!doctype html>")
    assert "### Which transport" in (tmp_path / "tables.md").read_text()


def test_several_results_are_shown_with_one_table_of_targets(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.json" for number in range(3)]
    for number, file in enumerate(files):
        content = examples.measured("socket", 1.0), examples.measured("tcp/verified/in-place", 1 + number / 10)
        results.save(examples.results(*content), file)
    status, out, _ = call("--show", *files, "--markdown", tmp_path / "tables.md")
    assert status == 0
    assert "Of 3 runs." in out
    assert "| ≥ 0.85 | 0.909 | 0.833 | 1 | yes |" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--payload", "many"], "'many'"),
        (["--only", "carrier-pigeon"], "copy/private"),
        (["--show", "no-such-file.json"], "no-such-file.json"),
        (["--rounds", "0"], "--rounds"),
        (["results.json"], "--show"),
    ],
)
def test_bad_usage_ends_with_status_2_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(*words)
    assert status == 2
    assert why in err


def test_a_document_without_a_place_for_results_is_left_alone(tmp_path: Path) -> None:
    results.save(examples.results(examples.measured("socket", 0.1)), tmp_path / "results.json")
    (tmp_path / "mine.md").write_text("mine\n")
    status, _, err = call("--show", tmp_path / "results.json", "--markdown", tmp_path / "mine.md")
    assert status == 2
    assert "no place for results" in err
    assert (tmp_path / "mine.md").read_text() == "mine\n"
