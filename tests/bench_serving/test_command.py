"""The command: what it writes, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.bench.serving import results
from embferry.cli.main import app

from . import stub
from .made import results as made_results
from .made import run, sample


def called(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    outcome = CliRunner().invoke(app, ["bench", "serve", *map(str, words)])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


FEW = ("--requests", 4, "--rate", "inf", "--max-images", 1, "--max-image-tokens", 64, "--max-tokens", 2)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "give one of --url, --compare and --show"),
        (["--compare", "--url", "http://127.0.0.1:9"], "give one of"),
        (["--url", "127.0.0.1:9"], "begins with http://"),
        (["--url", "http://127.0.0.1:9"], "names no model"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--extra", "[]"], "--extra is an object"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--extra", "{"], "Expecting"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--rate", "0"], "the rate is above 0"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--verify", "no-such-file"], "no-such-file is neither"),
        (["--show", "no-such-file"], "no-such-file"),
        (["--repeated", "0.9"], "--repeated"),
        (["--compare", "--python", "/other", "--only", "pigeon"], "nobody is called 'pigeon'"),
        (["--compare", "--python", "/other", "--verify", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_usage_ends_with_2_and_says_why(words: list[str], why: str) -> None:
    status, _, err = called(*words)
    assert status == 2
    assert why in err


def test_earlier_results_are_shown_and_compared_with_others(tmp_path: Path) -> None:
    ours, known = tmp_path / "ours.json", tmp_path / "known.json"
    results.save(made_results(run(sample(0), sample(1, tokens=(9, 9))), compared=False), ours)
    results.save(made_results(run(sample(0), sample(1)), compared=False), known)
    status, out, err = called("--show", ours, "--markdown", tmp_path / "page.md")
    assert status == 0
    assert "command: embferry bench serve --compare" in out
    assert "| failed requests | 0 |" in (tmp_path / "page.md").read_text()
    status, out, err = called("--show", ours, "--verify", known)
    assert status == 1
    assert "0 of 2 requests failed, 1 answers are wrong" in err
    (tmp_path / "page.md").write_text("mine\n")
    assert called("--show", ours, "--markdown", tmp_path / "page.md")[0] == 2
    assert (tmp_path / "page.md").read_text() == "mine\n"


@pytest.mark.integration
def test_an_endpoint_is_driven_compared_and_reported(tmp_path: Path) -> None:
    metrics = "# TYPE embferry_ec_resumed_transfers counter\nembferry_ec_resumed_transfers_total 0.0\n"
    documents = {"/v1/models": '{"data": [{"id": "one"}]}', "/version": '{"version": "9.9"}', "/metrics": metrics}
    asked = []

    def answer(exchange: stub.Exchange) -> None:
        asked.append(exchange.body)
        exchange.answer([1, 2])

    with stub.serving(answer, documents) as url:
        words = ("--metrics", f"{url}/metrics", "--verify", url, "--extra", '{"ignore_eos": true}')
        status, out, err = called("--url", f"{url}/", *FEW, *words, "--out", tmp_path)
    assert (status, len(asked)) == (0, 8)
    assert all(body["ignore_eos"] is True and body["model"] == "one" for body in asked)
    (ran,) = results.load(tmp_path / "serve.json").runs
    assert [each.wrong for each in ran.samples] == [False] * 4
    assert (ran.counters["resumes"], ran.counters["bytes sent twice"]) == (0.0, None)
    assert "server: 9.9" in out
    assert "8 of 8 requests" in err


@pytest.mark.integration
def test_another_answer_than_before_is_a_failure(tmp_path: Path) -> None:
    with stub.serving(lambda exchange: exchange.answer([1])) as url:
        assert called("--url", url, "--model", "m", *FEW, "--out", tmp_path / "a")[0] == 0
    with stub.serving(lambda exchange: exchange.answer([2])) as url:
        words = ("--verify", tmp_path / "a" / "serve.json", "--out", tmp_path / "b")
        status, _, err = called("--url", url, "--model", "m", *FEW, *words)
        assert status == 1
        assert "0 of 4 requests failed, 4 answers are wrong" in err
        assert called("--url", url, "--model", "m", *FEW, "--seed", 5, *words)[0] == 2


@pytest.mark.integration
def test_ctrl_c_keeps_what_was_measured_and_ends_with_130(tmp_path: Path) -> None:
    def answer(exchange: stub.Exchange) -> None:
        if len(hung) == 1:
            exchange.hang()
        hung.append(exchange)
        exchange.answer([1])

    hung: list[stub.Exchange] = []
    with stub.serving(answer) as url:
        words = ["--url", url, "--model", "m", *map(str, FEW), "--concurrency", "1", "--out", str(tmp_path)]
        process = subprocess.Popen(
            [sys.executable, "-c", "from embferry.cli.main import run; run()", "bench", "serve", *words],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"COLUMNS": "100"},
            text=True,
        )
        try:
            deadline = time.monotonic() + 40
            while not hung:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 130, err
    saved = results.load(tmp_path / "serve.json")
    assert (saved.complete, [each.number for each in saved.runs[0].samples]) in ((False, [0]), (False, []))
    assert "it was interrupted" in out
