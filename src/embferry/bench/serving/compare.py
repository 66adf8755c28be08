"""The comparison: each configuration is started, runs every scenario, and is ended."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from ..results import Progress
from . import answers, counters, vllm_plugins
from .answers import Answers
from .client import Callbacks, send_all
from .configurations import CONFIGURATIONS, POOL_BYTES, UNDIVIDED, Configuration
from .pictures import url
from .results import Run, Sample, ServingResults, Status
from .scenarios import SCENARIOS, Scenario, damaging, skipped
from .server import StartError
from .stack import Stack
from .workload import LARGEST, Picture, Request, drawn

WARM = (Request(0, 0.0, (Picture((9, 0), 420, 756, 405),)), Request(1, 0.0, (Picture((9, 1), 420, 756, 405),)))
WARM_TIMEOUT_S = 60.0


class Choice(msgspec.Struct, frozen=True):
    """Options of the user."""

    python: str
    """The interpreter that has vLLM."""
    configurations: tuple[Configuration, ...] = CONFIGURATIONS
    scenarios: tuple[Scenario, ...] = SCENARIOS
    quick: bool = False
    rounds: int = 1
    """How often everything is done; each round starts and ends every configuration."""
    spin: bool = False
    """Let vLLM's processes poll for messages, as they do by default."""
    logs: Path | None = None
    """The folder for the servers' logs; they are removed if it is None."""


def chosen(only: Sequence[str]) -> tuple[tuple[Configuration, ...], tuple[Scenario, ...]]:
    """Returns the configurations and scenarios whose name matches a pattern; all of a kind if none of it matches.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = [each.name for each in (*CONFIGURATIONS, *SCENARIOS)]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no configuration or scenario is called {pattern!r}; choose from {', '.join(names)}")
    configurations = tuple(c for c in CONFIGURATIONS if any(fnmatchcase(c.name, pattern) for pattern in only))
    scenarios = tuple(s for s in SCENARIOS if any(fnmatchcase(s.name, pattern) for pattern in only))
    return configurations or CONFIGURATIONS, scenarios or SCENARIOS


def total_requests(choice: Choice) -> int:
    sizes = {scenario.name: len(scenario.requests(choice.quick)) for scenario in choice.scenarios}
    pairs = [(scenario, configuration) for scenario in choice.scenarios for configuration in choice.configurations]
    measured = sum(sizes[scenario.name] for scenario, each in pairs if not skipped(scenario, each))
    return sum(sizes.values()) + choice.rounds * measured


def setting(choice: Choice) -> list[tuple[str, str]]:
    """Returns facts for the report."""
    poll = "processes of vLLM that wait for each other"
    return [
        ("model", "a Qwen2.5-VL with 2.2 million random parameters, 256 values of float32 a token (1 KiB)"),
        (
            "servers",
            "undivided: one engine; divided: two encoders, one language instance, a router; each with one thread for "
            "arithmetic, all on the cores above, together with the benchmark",
        ),
        (
            "pool",
            f"{POOL_BYTES >> 20} MiB unless said otherwise; the example connector's files are in the temporary folder",
        ),
        (
            "waiting",
            f"{poll} poll for 1 s, as vLLM has it"
            if choice.spin
            else f"{poll} sleep after {vllm_plugins.SPIN_S * 1e3:g} ms in all configurations; by default after 1 s",
        ),
        ("answers", "greedy; compared token by token with those of the undivided engine, asked one by one"),
    ]


class _Case(msgspec.Struct):
    """A scenario, its requests, and the right answers once they are known."""

    scenario: Scenario
    requests: list[Request]
    urls: list[list[str]]
    answers: Answers = {}


def compare(choice: Choice, results: ServingResults, progress: Progress) -> None:
    """Adds runs to ``results``. Leaves nothing else but logs, if asked for.

    Raises:
        StartError: the undivided engine does not start, so there is nothing to compare with.
        KeyboardInterrupt: interrupted; what was measured is in the results.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break ours
    from embferry.models.tiny_qwen import make

    progress("drawing pictures", 0)
    with tempfile.TemporaryDirectory(prefix="embferry-bench-", ignore_cleanup_errors=True) as folder:
        model = Path(folder) / "model"
        make(model, max_image_tokens=LARGEST, max_positions=16384)
        cases = [_case(scenario, choice.quick) for scenario in choice.scenarios]
        try:
            _Comparison(choice, results, progress, cases, Path(folder)).run()
        finally:
            titles, names = [s.title for s in SCENARIOS], [c.name for c in CONFIGURATIONS]
            results.runs.sort(key=lambda run: (titles.index(run.scenario), names.index(run.name), run.round))


class _Comparison:
    def __init__(
        self, choice: Choice, results: ServingResults, progress: Progress, cases: list[_Case], folder: Path
    ) -> None:
        self._choice, self._results, self._progress = choice, results, progress
        self._cases, self._folder, self._logs = cases, folder, choice.logs or folder / "logs"
        self._starts: list[str] = []

    def run(self) -> None:
        for turn in range(1, self._choice.rounds + 1):
            for configuration in CONFIGURATIONS:
                # The right answers come first, from the undivided engine.
                if configuration in self._choice.configurations or (configuration is UNDIVIDED and turn == 1):
                    self._configuration(configuration, turn)

    def _configuration(self, configuration: Configuration, turn: int) -> None:
        """Runs all scenarios of a configuration. If it does not start, or ends on the way, its runs say so."""
        measured = configuration in self._choice.configurations
        cases = [case for case in self._cases if not skipped(case.scenario, configuration)]
        for case in self._cases if measured and turn == 1 else ():
            if reason := skipped(case.scenario, configuration):
                self._add(case, configuration, turn, "skipped", reason)
        name = f"{configuration.name}-{turn}" if self._choice.rounds > 1 else configuration.name
        began = time.monotonic()
        stack = Stack(
            configuration,
            self._choice.python,
            self._folder / "model",
            self._folder / name,
            self._logs / name,
            lambda what: self._progress(f"{configuration.title}: {what}", 0),
            small=any(case.scenario.damage == "small pool" for case in cases),
            corrupt=any(case.scenario.damage == "corrupted" for case in cases),
            spin=self._choice.spin,
        )
        try:
            with stack:
                self._starts.append(f"{configuration.name} {time.monotonic() - began:.0f}")
                facts = dict(self._results.setting) | {"seconds to start": ", ".join(self._starts)}
                self._results.setting = list(facts.items())
                _warm(stack)
                if configuration is UNDIVIDED:
                    for case in self._cases:
                        case.answers = case.answers or self._right_answers(stack, case)
                for case in cases if measured else ():
                    try:
                        self._scenario(stack, case, turn)
                    except StartError as error:
                        self._failed(case, configuration, turn, error)
        except StartError as error:
            if configuration is UNDIVIDED:
                raise
            for case in cases:
                self._failed(case, configuration, turn, error)

    def _scenario(self, stack: Stack, case: _Case, turn: int) -> None:
        scenario, what = case.scenario, f"{stack.configuration.title}: {case.scenario.name}"

        def ended(sample: Sample) -> None:
            self._progress(what, 1)

        self._progress(what, 0)
        run = Run(stack.configuration.name, stack.configuration.title, scenario.title, turn)
        with damaging(scenario, stack, run, len(case.requests), ended) as callbacks:
            endpoint = stack.endpoint(scenario.max_tokens, scenario.timeout_s, scenario.concurrency)
            before = counters.read(stack.metrics)
            measured = send_all(endpoint, case.requests, case.urls, callbacks)
            after = counters.read(stack.metrics)
        self._results.runs.append(run)
        run.plan, run.drawn = scenario.planned(self._choice.quick), drawn(case.requests)
        run.max_tokens, run.concurrency = scenario.max_tokens, scenario.concurrency
        run.samples, run.duration, run.complete = measured.samples, measured.duration, measured.complete
        run.counters = counters.between(before, after) if after else {}
        answers.compare(run, case.answers)
        if not run.complete:
            raise KeyboardInterrupt

    def _right_answers(self, stack: Stack, case: _Case) -> Answers:
        what = f"{stack.configuration.title}: right answers of {case.scenario.name}"
        self._progress(what, 0)
        endpoint = stack.endpoint(case.scenario.max_tokens, case.scenario.timeout_s, 1)
        callbacks = Callbacks(ended=lambda sample: self._progress(what, 1))
        return answers.ask(endpoint, case.requests, case.urls, callbacks)

    def _add(self, case: _Case, configuration: Configuration, turn: int, status: Status, reason: str) -> None:
        self._results.runs.append(
            Run(configuration.name, configuration.title, case.scenario.title, turn, status, reason)
        )

    def _failed(self, case: _Case, configuration: Configuration, turn: int, error: StartError) -> None:
        self._add(case, configuration, turn, "error", str(error))
        self._progress(f"{configuration.title}: {error}", len(case.requests))


def _warm(stack: Stack) -> None:
    """Sends two requests.

    Raises:
        StartError: one is not answered.
    """
    endpoint = stack.endpoint(4, WARM_TIMEOUT_S, 1)
    try:
        answers.ask(endpoint, WARM, [[url(picture) for picture in request.pictures] for request in WARM], Callbacks())
    except ValueError as error:
        raise StartError(f"started, and then: {error}") from None


def _case(scenario: Scenario, quick: bool) -> _Case:
    made = scenario.requests(quick)
    return _Case(scenario, made, [[url(picture) for picture in request.pictures] for request in made])
