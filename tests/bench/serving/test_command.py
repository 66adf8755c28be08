"""``embferry bench serve``: its files, messages and exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.bench.results import load, save
from embferry.bench.serving.results import ServingResults
from embferry.cli.main import app

from . import stub_endpoint as stub
from .examples import results, run, sample


def call(*words: object) -> tuple[int, str, str]:
    """Returns exit status, stdout and stderr."""
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
        (["--url", "127.0.0.1:9"], "has to begin with http://"),
        (["--url", "http://127.0.0.1:9"], "lists no model"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--extra", "[]"], "--extra"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--extra", "{"], "Expecting"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--rate", "0"], "rate: at least 1e-06"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--verify", "no-such-file"], "no-such-file is neither"),
        (["--show", "no-such-file"], "no-such-file"),
        (["--repeated", "0.9"], "--repeated"),
        (["--compare", "--python", "/other", "--only", "pigeon"], "'pigeon'"),
        (["--compare", "--engine", "sglang", "--python", "/other", "--only", "example"], "zmq_to_scheduler"),
        (["--compare", "--engine", "sglang"], "SGLang is not installed here"),
        (["--compare", "--engine", "pigeon"], "'pigeon'"),
        (["--compare", "--python", "/other", "--verify", "some-file"], "--verify"),
    ],
)
def test_bad_usage_ends_with_status_2_and_the_reason(words: list[str], why: str) -> None:
    status, _, err = call(*words)
    assert status == 2
    assert why in err


def test_earlier_results_are_shown_and_compared_with_others(tmp_path: Path) -> None:
    ours, known = tmp_path / "ours.json", tmp_path / "known.json"
    save(results(run(sample(0), sample(1, tokens=(9, 9))), compared=False), ours)
    save(results(run(sample(0), sample(1)), compared=False), known)
    status, out, err = call("--show", ours, "--markdown", tmp_path / "page.md")
    assert status == 0
    assert "command: embferry bench serve --compare" in out
    assert "| failed requests | 0 |" in (tmp_path / "page.md").read_text()
    status, out, err = call("--show", ours, "--verify", known)
    assert status == 1
    assert "0 of 2 requests failed, 1 answers are wrong" in err
    (tmp_path / "page.md").write_text("mine\n")
    assert call("--show", ours, "--markdown", tmp_path / "page.md")[0] == 2
    assert (tmp_path / "page.md").read_text() == "mine\n"


@pytest.mark.integration
def test_an_endpoint_is_measured_compared_and_reported(tmp_path: Path) -> None:
    metrics = "# TYPE embferry_connector_resumed_transfers counter\nembferry_connector_resumed_transfers_total 0.0\n"
    documents = {"/v1/models": '{"data": [{"id": "one"}]}', "/version": '{"version": "9.9"}', "/metrics": metrics}
    asked = []

    def answer(request: stub.Request) -> None:
        asked.append(request.body)
        request.answer([1, 2])

    with stub.serving(answer, documents) as url:
        words = ("--metrics", f"{url}/metrics", "--verify", url, "--extra", '{"ignore_eos": true}')
        status, out, err = call("--url", f"{url}/", *FEW, *words, "--out", tmp_path)
    assert (status, len(asked)) == (0, 8)
    assert all(body["ignore_eos"] is True and body["model"] == "one" for body in asked)
    (ran,) = load(tmp_path / "serve.json", ServingResults).runs
    assert [each.wrong for each in ran.samples] == [False] * 4
    assert (ran.counters["resumes"], ran.counters["bytes sent twice"]) == (0.0, None)
    assert "server: 9.9" in out
    assert "8 of 8 requests" in err


@pytest.mark.integration
def test_a_different_answer_than_before_is_a_failure(tmp_path: Path) -> None:
    with stub.serving(lambda request: request.answer([1])) as url:
        assert call("--url", url, "--model", "m", *FEW, "--out", tmp_path / "a")[0] == 0
    with stub.serving(lambda request: request.answer([2])) as url:
        words = ("--verify", tmp_path / "a" / "serve.json", "--out", tmp_path / "b")
        status, _, err = call("--url", url, "--model", "m", *FEW, *words)
        assert status == 1
        assert "0 of 4 requests failed, 4 answers are wrong" in err
        assert call("--url", url, "--model", "m", *FEW, "--seed", 5, *words)[0] == 2


@pytest.mark.integration
def test_ctrl_c_keeps_the_samples_and_ends_with_status_130(tmp_path: Path) -> None:
    def answer(request: stub.Request) -> None:
        if len(hung) == 1:
            request.hang()
        hung.append(request)
        request.answer([1])

    hung: list[stub.Request] = []
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
            deadline = time.monotonic() + 60
            while not hung:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    saved = load(tmp_path / "serve.json", ServingResults)
    assert (saved.complete, [each.number for each in saved.runs[0].samples]) in ((False, [0]), (False, []))
    assert "the run was interrupted" in out
