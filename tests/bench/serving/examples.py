"""Results made by hand."""

from __future__ import annotations

from typing import Any

from embferry.bench.machine import Machine
from embferry.bench.serving.results import Run, Sample, ServingResults
from embferry.bench.serving.workload import Plan

MACHINE = Machine("a CPU", 2, 8_000_000_000, "Linux 6", "", {"vllm": "0.32.0", "nixl": ""})


def sample(number: int, **more: Any) -> Sample:
    """Returns a sample that was answered with two tokens; its latency follows from the other times."""
    values: dict[str, Any] = {
        "began": float(number),
        "pictures": 1,
        "image_tokens": 405,
        "repeated": 0,
        "status": 200,
        "error": "",
        "ttft": 0.2,
        "itls": (0.05,),
        "output_tokens": 2,
        "prompt_tokens": 420,
        "tokens": (1, 2),
        "text": "ab",
    } | more
    values.setdefault("latency", (values["ttft"] or 0) + sum(values["itls"]))
    return Sample(number=number, **values)


def run(*samples: Sample, name: str = "ours-tcp", scenario: str = "Everything fits", **more: Any) -> Run:
    values: dict[str, Any] = {
        "title": name,
        "plan": Plan(requests=len(samples) or 1),
        "max_tokens": 2,
        "duration": 4.0,
    } | more
    return Run(name=name, scenario=scenario, samples=list(samples), **values)


def results(*runs: Run, compared: bool = True, complete: bool = True) -> ServingResults:
    return ServingResults(
        command="embferry bench serve --compare",
        started="2026-01-02T03:04:05+00:00",
        took_s=61.0,
        compared=compared,
        machine=MACHINE,
        runs=list(runs),
        complete=complete,
        setting=[("model", "a tiny one")],
    )
