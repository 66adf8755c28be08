"""The comparison: each configuration is started, runs every scenario, and is ended; or all run at once, by turns."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from ..results import Progress
from . import answers
from .client import send_all
from .configurations import Configuration, Damage
from .engines import VLLM, Engine
from .results import Run, Sample, ServingResults, Status
from .scenarios import Scenario, damaging
from .stack import Stack, StartError
from .workload import LARGEST

Asked = tuple[str, int]
"""Requests that have the same answers: the name of their scenario, and the round if each is drawn anew, else 0."""


class Comparison:
    """The choice of the user, and the state while it is measured.

    Args:
        python: the interpreter that has the engine.
        only: patterns of names. Configurations and scenarios that match are compared; if none of a kind matches, all
            but those that are compared on request.
        quick: a few requests of each.
        rounds: how often everything is done; each round starts and ends every configuration.
        side_by_side: start all configurations at once, and ask each in turn. Each round is drawn anew. Only scenarios
            without damage.
        spin: let vLLM's processes poll for messages, as they do by default.
        logs: the folder for the servers' logs; they are removed if it is None.
        engine: the engine whose ways to split are compared.

    Raises:
        ValueError: a pattern matches nothing, or only scenarios with damage are to be measured side by side.
    """

    def __init__(
        self,
        python: str,
        only: Sequence[str] = (),
        *,
        quick: bool = False,
        rounds: int = 1,
        side_by_side: bool = False,
        spin: bool = False,
        logs: Path | None = None,
        engine: Engine = VLLM,
    ) -> None:
        names = [configuration.name for configuration in engine.configurations]
        names += [scenario.name for scenario in engine.scenarios]
        for pattern in only:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"no configuration or scenario is called {pattern!r}; choose from {', '.join(names)}")
        matching = {name for name in names if any(fnmatchcase(name, pattern) for pattern in only)}
        usual = [c for c in engine.configurations if not c.on_request]
        self.configurations = [c for c in engine.configurations if c.name in matching] or usual
        self.scenarios = [s for s in engine.scenarios if s.name in matching] or list(engine.scenarios)
        if side_by_side:
            self.scenarios = [scenario for scenario in self.scenarios if not scenario.damage]
            if not self.scenarios:
                raise ValueError("side by side, only scenarios without damage can be measured")
        if quick:
            self.scenarios = [scenario.shortened() for scenario in self.scenarios]
        self._engine = engine
        self._python, self._rounds, self._spin, self._logs = python, rounds, spin, logs
        self._side_by_side = side_by_side
        self._answers: dict[Asked, answers.Answers] = {}
        self._unjudged: list[tuple[Asked, Run]] = []
        self._starts: list[str] = []
        self._kept: list[str] = []

    @property
    def total_requests(self) -> int:
        pairs = [(s, c) for s in self.scenarios for c in self.configurations if not self._engine.skipped(s, c)]
        measured = sum(len(scenario.requests()) for scenario, _ in pairs)
        answered = sum(len(scenario.requests()) for scenario in self.scenarios)
        return self._rounds * measured + answered * (self._rounds if self._side_by_side else 1)

    def keep(self, earlier: ServingResults, results: ServingResults) -> None:
        """Copies runs of earlier results that are not measured again.

        Raises:
            ValueError: they are of another engine or machine, or of other versions, or only one of both is quick.
        """
        if (earlier.engine, earlier.quick) != (results.engine, results.quick) or not results.machine.extends(
            earlier.machine
        ):
            raise ValueError(
                "the earlier results are of another engine, machine or version, or only one of both is quick"
            )
        names, titles = {each.name for each in self.configurations}, {each.title for each in self.scenarios}
        results.runs = [run for run in earlier.runs if run.name not in names or run.scenario not in titles]
        self._kept = [*dict(earlier.setting).get("runs kept", "").split("; "), f"{earlier.started}: {earlier.command}"]
        self._starts += dict(earlier.setting).get("seconds to start", "").split(", ")

    def setting(self) -> list[tuple[str, str]]:
        """Returns facts for the report."""
        facts = {
            "model": "a Qwen2.5-VL with 2.2 million random parameters, 256 values of float32 a token (1 KiB)",
            **self._engine.facts(self._spin),
            "answers": "greedy; compared token by token with those of the undivided engine, asked one by one",
            "seconds to start": ", ".join(self._starts),
            "runs kept": "; ".join(filter(None, self._kept)),
        }
        return [(name, text) for name, text in facts.items() if text]

    def run(self, results: ServingResults, progress: Progress) -> None:
        """Adds runs to ``results``. Leaves nothing else but logs, if asked for.

        Raises:
            StartError: the undivided engine does not start, so there is nothing to compare with.
            KeyboardInterrupt: interrupted; what was measured is in the results.
        """
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break ours
        from embferry.models.tiny_qwen import make

        self._results, self._progress = results, progress
        results.side_by_side = self._side_by_side
        progress("making the model", 0)
        with tempfile.TemporaryDirectory(prefix="embferry-bench-", ignore_cleanup_errors=True) as folder:
            make(Path(folder) / "model", max_image_tokens=LARGEST, max_positions=16384)
            try:
                (self._by_turns if self._side_by_side else self._one_by_one)(Path(folder))
            finally:
                titles = [scenario.title for scenario in self._engine.scenarios]
                names = [configuration.name for configuration in self._engine.configurations]
                results.runs.sort(key=lambda run: (titles.index(run.scenario), names.index(run.name), run.round))
                results.setting = self.setting()

    def _one_by_one(self, folder: Path) -> None:
        for turn in range(1, self._rounds + 1):
            for configuration in self._engine.configurations:
                # The undivided engine comes first, because it has the right answers.
                if configuration in self.configurations or (configuration is self._engine.undivided and turn == 1):
                    self._configuration(configuration, turn, folder)

    def _configuration(self, configuration: Configuration, turn: int, folder: Path) -> None:
        """Runs all scenarios of a configuration. If it does not start, or ends on the way, its runs say so."""
        measured = self.scenarios if configuration in self.configurations else []
        for scenario in measured if turn == 1 else ():
            if reason := self._engine.skipped(scenario, configuration):
                self._add(scenario, configuration, turn, "skipped", reason)
        measured = [scenario for scenario in measured if not self._engine.skipped(scenario, configuration)]
        name = f"{configuration.name}-{turn}" if self._rounds > 1 else configuration.name
        stack = self._stack(configuration, name, folder, {scenario.damage for scenario in measured})
        try:
            with self._started(stack):
                for scenario in measured:
                    if scenario.damage and not self._answers:
                        self._ask(stack)
                    self._scenario(stack, scenario, turn)
                if not self._answers:
                    self._ask(stack)
        except StartError as error:
            if configuration is self._engine.undivided:
                raise
            for scenario in measured:
                self._failed(scenario, configuration, turn, error)

    def _by_turns(self, folder: Path) -> None:
        """Starts all configurations, then asks each in every scenario and round. Each is once the first, in turn."""
        undivided, stacks = self._engine.undivided, list[Stack]()
        wanted = [undivided, *(each for each in self.configurations if each is not undivided)]
        with ExitStack() as running:
            for configuration in wanted:
                stack = self._stack(configuration, configuration.name, folder, ())
                try:
                    running.enter_context(self._started(stack))
                except StartError as error:
                    if configuration is undivided:
                        raise
                    for turn in range(1, self._rounds + 1):
                        for scenario in self.scenarios:
                            self._failed(scenario, configuration, turn, error)
                else:
                    stacks.append(stack)
            measured = [stack for stack in stacks if stack.configuration in self.configurations]
            for turn in range(1, self._rounds + 1):
                first = turn % len(measured) if measured else 0
                for scenario in self.scenarios:
                    for stack in measured[first:] + measured[:first]:
                        self._scenario(stack, scenario, turn)
                self._ask(stacks[0], turn)

    def _stack(self, configuration: Configuration, name: str, folder: Path, damages: Collection[Damage]) -> Stack:
        return self._engine.stack(
            configuration,
            self._python,
            folder / "model",
            folder / name,
            (self._logs or folder / "logs") / name,
            lambda what: self._progress(f"{configuration.title}: {what}", 0),
            damages=damages,
            spin=self._spin,
        )

    @contextmanager
    def _started(self, stack: Stack) -> Iterator[None]:
        began = time.monotonic()
        with stack:
            self._starts.append(f"{stack.configuration.name} {time.monotonic() - began:.0f}")
            yield

    def _ask(self, stack: Stack, turn: int = 0) -> None:
        """Asks for the right answers, when the same engine was measured: it remembers pictures."""
        for scenario in self.scenarios:
            what = f"{stack.configuration.title}: right answers of {scenario.name}"
            self._progress(what, 0)
            endpoint = stack.endpoint(scenario.max_tokens, scenario.timeout_s, 1)
            self._answers[scenario.name, turn] = answers.ask(endpoint, scenario.requests(turn), self._told(what))
        self._judge()

    def _judge(self) -> None:
        """Compares the answers of the runs for which the right ones are known."""
        waiting, self._unjudged = self._unjudged, []
        for asked, run in waiting:
            if asked in self._answers:
                answers.compare(run, self._answers[asked])
            else:
                self._unjudged.append((asked, run))

    def _scenario(self, stack: Stack, scenario: Scenario, turn: int) -> None:
        """Measures one scenario. If a server that it needs does not start, its run says so."""
        try:
            self._measure(stack, scenario, turn)
        except StartError as error:
            self._failed(scenario, stack.configuration, turn, error)

    def _measure(self, stack: Stack, scenario: Scenario, turn: int) -> None:
        asked = (scenario.name, turn if self._side_by_side else 0)
        what, requests = f"{stack.configuration.title}: {scenario.name}", scenario.requests(asked[1])
        self._progress(what, 0)
        run = Run(stack.configuration.name, stack.configuration.title, scenario.title, turn, plan=scenario.plan)
        with damaging(scenario, stack, run, len(requests)) as began:
            self._results.runs.append(run)
            self._unjudged.append((asked, run))
            endpoint = stack.endpoint(scenario.max_tokens, scenario.timeout_s, scenario.concurrency)
            before = stack.cpu_seconds
            try:
                send_all(endpoint, requests, run, self._told(what), began, stack.metrics)
            finally:
                run.cpu_seconds = None if scenario.damage else stack.cpu_seconds - before
                self._judge()

    def _told(self, what: str) -> Callable[[Sample], None]:
        return lambda sample: self._progress(what, 1)

    def _add(self, scenario: Scenario, configuration: Configuration, turn: int, status: Status, reason: str) -> None:
        run = Run(configuration.name, configuration.title, scenario.title, turn, status, reason)
        self._results.runs.append(run)

    def _failed(self, scenario: Scenario, configuration: Configuration, turn: int, error: StartError) -> None:
        self._add(scenario, configuration, turn, "error", str(error))
        self._progress(f"{configuration.title}: {error}", len(scenario.requests()))
