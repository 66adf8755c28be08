"""The comparison of SGLang's ways to split, with real processes that stand for its servers."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from embferry.bench import machine
from embferry.bench.serving import faults, sglang
from embferry.bench.serving.compare import Comparison
from embferry.bench.serving.configurations import POOL_BYTES, SMALL_POOL_BYTES, TOKEN_BYTES
from embferry.bench.serving.engines import SGLANG, Engine
from embferry.bench.serving.results import Run, ServingResults
from embferry.bench.serving.workload import Plan

ROOT = Path(__file__).resolve().parents[3]


def test_the_small_pool_holds_only_the_second_embedding_and_so_does_mooncakes() -> None:
    large, fitting = next(each for each in SGLANG.scenarios if each.name == "pool").pictures
    assert large.tokens * TOKEN_BYTES > sglang.SMALLEST_MIB << 20
    assert fitting.tokens * TOKEN_BYTES <= SMALL_POOL_BYTES


@pytest.mark.parametrize("configuration", SGLANG.configurations, ids=lambda each: each.name)
def test_only_our_plug_in_has_settings(configuration: sglang.Configuration) -> None:
    made = sglang.plugin(configuration, POOL_BYTES, 13)
    if configuration.connector != "embferry":
        assert made == {}
        return
    assert (made["EMBFERRY_SGLANG"], made["EMBFERRY_SGLANG_METRICS_PORT"]) == ("1", "13")
    assert made["EMBFERRY_SGLANG_TRANSPORTS"] == configuration.transport
    tokens = int(made["EMBFERRY_SGLANG_NUM_BLOCKS"]) * int(made["EMBFERRY_SGLANG_BLOCK_SIZE"])
    assert tokens * TOKEN_BYTES == POOL_BYTES


def test_the_settings_are_the_plug_ins() -> None:
    from embferry.connectors.sglang.settings import read

    (ours,) = (each for each in SGLANG.configurations if each.name == "ours-tcp")
    assert read(sglang.plugin(ours, SMALL_POOL_BYTES, None)).transports == ("tcp",)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Returns the path of a program that stands for a Python interpreter with SGLang."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH="{ROOT}:{ROOT}/src" exec "{sys.executable}" -m tests.bench.serving.fake_sglang "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Returns SGLang with scenarios of three requests; no model is made."""
    plan = Plan(requests=3, rate=4.0, burstiness_cv=0, max_images=1, max_image_tokens=64)
    made = tuple(
        msgspec.structs.replace(each, plan=each.plan and plan, max_tokens=2, timeout_s=20) for each in SGLANG.scenarios
    )
    without_torch = types.ModuleType("tiny_qwen")
    without_torch.make = lambda folder, **sizes: folder.mkdir()  # type: ignore[attr-defined]  # a stand-in has no types
    monkeypatch.setitem(sys.modules, "embferry.models.tiny_qwen", without_torch)
    monkeypatch.setattr(faults, "PAUSE_S", 0.3)
    monkeypatch.setattr(faults, "GONE_S", 0.3)
    return msgspec.structs.replace(SGLANG, scenarios=made)


def compared(python: str, engine: Engine, *names: str) -> Mapping[tuple[str, str], Run]:
    """Returns the runs by the names of configuration and scenario."""
    comparison = Comparison(python, names, engine=engine)
    results, asked = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES, python)), 0

    def count(what: str, more: int) -> None:
        nonlocal asked
        asked += more

    comparison.run(results, count)
    assert asked == comparison.total_requests
    by_title = {scenario.title: scenario.name for scenario in engine.scenarios}
    return {(run.name, by_title[run.scenario]): run for run in results.runs}


def outcome(run: Run) -> tuple[int, int, int]:
    """Returns the numbers of right, failed and wrong answers."""
    return len(run.right), run.errors, run.wrong


@pytest.mark.integration
@pytest.mark.sweeps
def test_our_plug_in_answers_every_request_of_every_scenario(python: str, few: Engine) -> None:
    runs = compared(python, few, "ours-tcp")
    assert {name: outcome(run) for name, run in runs.items()} == {
        ("ours-tcp", each.name): (len(each.requests()), 0, 0) for each in few.scenarios
    }
    assert not any("ended" in note for run in runs.values() for note in run.notes)
    assert runs["ours-tcp", "damaged"].notes == [
        "embferry over tcp: one more request, with a damaged picture: HTTP 400: the picture is truncated"
    ]


@pytest.mark.integration
@pytest.mark.sweeps
def test_a_server_that_ends_is_reported_and_started_again(python: str, few: Engine) -> None:
    runs = compared(python, few, "zmq_to_scheduler", "damaged", "killed")
    ended = "SGLang's zmq_to_scheduler: language ended, with every request in it"
    assert ended in runs["zmq_to_scheduler", "damaged"].notes
    assert ended not in runs["zmq_to_scheduler", "killed"].notes
    assert runs["zmq_to_scheduler", "killed"].right


@pytest.mark.integration
@pytest.mark.sweeps
def test_an_answer_about_another_picture_is_wrong(python: str, few: Engine) -> None:
    runs = compared(python, few, "zmq_to_scheduler", "reused")
    assert [sample.wrong for sample in runs["zmq_to_scheduler", "reused"].samples] == [False, True, False]


@pytest.mark.integration
@pytest.mark.sweeps
def test_runs_of_earlier_results_are_kept(python: str, few: Engine) -> None:
    def begun() -> ServingResults:
        return ServingResults.begin(machine.describe(machine.SERVING_PACKAGES, python))

    earlier, results = begun(), begun()
    Comparison(python, ["undivided", "ours-nixl", "fits"], engine=few).run(earlier, lambda what, more: None)
    again = Comparison(python, ["undivided", "ours-shm", "fits"], engine=few)
    again.keep(earlier, results)
    again.run(results, lambda what, more: None)
    assert [run.name for run in results.runs] == ["undivided", "ours-shm", "ours-nixl"]
    assert dict(results.setting)["runs kept"] == f"{earlier.started}: {earlier.command}"
    assert dict(results.setting)["seconds to start"].count("undivided") == 2
    results.quick = True
    with pytest.raises(ValueError, match="only one of both is quick"):
        again.keep(earlier, results)


@pytest.mark.integration
def test_an_engine_that_is_not_installed_is_said_to_be_missing(python: str, few: Engine) -> None:
    runs = compared(python, few, "ours-nixl", "fits")
    assert runs["ours-nixl", "fits"].status == "error"
    assert "the engine is not installed" in runs["ours-nixl", "fits"].reason
