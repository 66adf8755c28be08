"""The comparison: one configuration after another is started, put through every scenario, and ended."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
import xxhash

from . import answers, counters, idle_workers, place
from .answers import Answers
from .configurations import CONFIGURATIONS, POOL_BYTES, UNDIVIDED, Configuration
from .driver import Watch, drive
from .pictures import url
from .results import SCHEMA, Reference, Results, Run, Sample
from .scenarios import SCENARIOS, Scenario, breaking, empty, skipped
from .server import StartError
from .stack import Stack
from .workload import LARGEST, Picture, Request, drawn

Report = Callable[[str, int], None]
"""What is being done, and how many requests have ended since the last time."""

WARM = (Request(0, 0.0, (Picture((9, 0), 420, 756, 405),)), Request(1, 0.0, (Picture((9, 1), 420, 756, 405),)))
WARM_TIMEOUT_S = 60.0


class Choice(msgspec.Struct, frozen=True):
    """What the user asked for."""

    python: str
    configurations: tuple[Configuration, ...] = CONFIGURATIONS
    scenarios: tuple[Scenario, ...] = SCENARIOS
    quick: bool = False
    rounds: int = 1
    """How often all of it is done, one configuration after another each time, from their start to their end."""
    spin: bool = False
    """Whether vLLM's processes look for messages without rest, as they do by themselves."""
    command: str = ""
    known: tuple[Reference, ...] = ()
    """Right answers from an earlier run. The undivided engine is not asked for those again, and not started if it does
    not take part itself."""
    logs: Path | None = None
    """Where the servers' logs go; with the rest, away, if not given."""


class Case(msgspec.Struct):
    """A scenario with all that is sent in it, and the right answers."""

    scenario: Scenario
    requests: list[Request]
    urls: list[list[str]]
    answers: Answers


def work(choice: Choice) -> int:
    """Requests of everything, for a progress bar."""
    sizes = {scenario.name: len(scenario.requests(choice.quick)) for scenario in choice.scenarios}
    known = {each.scenario for each in choice.known}
    asked = sum(sizes[scenario.name] for scenario in choice.scenarios if scenario.name not in known)
    pairs = [(scenario, configuration) for scenario in choice.scenarios for configuration in choice.configurations]
    return asked + choice.rounds * sum(sizes[scenario.name] for scenario, who in pairs if not skipped(scenario, who))


def chosen(only: Sequence[str]) -> tuple[tuple[Configuration, ...], tuple[Scenario, ...]]:
    """Those with a name of the given ones, in which ``*`` stands for anything; all, where no name is of that kind.

    :raises ValueError: nobody has such a name."""
    for pattern in only:
        if not any(fnmatchcase(each.name, pattern) for each in (*CONFIGURATIONS, *SCENARIOS)):
            there = ", ".join(each.name for each in (*CONFIGURATIONS, *SCENARIOS))
            raise ValueError(f"nobody is called {pattern!r}; there are {there}")
    configurations = tuple(c for c in CONFIGURATIONS if any(fnmatchcase(c.name, pattern) for pattern in only))
    scenarios = tuple(s for s in SCENARIOS if any(fnmatchcase(s.name, pattern) for pattern in only))
    return configurations or CONFIGURATIONS, scenarios or SCENARIOS


def compare(choice: Choice, results: Results, report: Report) -> None:
    """Adds to ``results`` what it measures, run by run. Nothing remains of it but that, and the logs if asked for.

    :raises StartError: the undivided engine does not start; there is nothing to compare with.
    :raises KeyboardInterrupt: it was interrupted; what has been measured is there."""
    from embferry.models.tiny_qwen import make

    report("drawing pictures", 0)
    with tempfile.TemporaryDirectory(prefix="embferry-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        model, logs = folder / "model", choice.logs or folder / "logs"
        make(model, max_image_tokens=LARGEST, max_positions=16384)
        digest = _digest(model)
        cases = [_case(scenario, choice, digest) for scenario in choice.scenarios]
        # The right answers come first, from the engine that is compared as well.
        asked = {UNDIVIDED} if any(not case.answers for case in cases) else set()
        ordered = sorted({*asked, *choice.configurations}, key=CONFIGURATIONS.index)
        turns = [(turn, each) for turn in range(1, choice.rounds + 1) for each in ordered]
        try:
            for turn, configuration in turns:
                if turn > 1 and configuration not in choice.configurations:
                    continue
                name = f"{configuration.name}-{turn}" if choice.rounds > 1 else configuration.name
                _one(configuration, choice, turn, cases, (model, folder / name, logs / name), results, report)
        finally:
            results.references = [
                msgspec.structs.replace(_reference(case.scenario, choice, digest), answers=case.answers)
                for case in cases
                if case.answers
            ]
            results.runs.sort(key=_place)


def _place(run: Run) -> tuple[int, int, int]:
    """Scenario by scenario, the configurations in their order, round by round."""
    scenarios, names = [each.title for each in SCENARIOS], [each.name for each in CONFIGURATIONS]
    return scenarios.index(run.scenario), names.index(run.name), run.round


def blank(choice: Choice) -> Results:
    """Without a run.

    :raises ValueError: what was to be the Python is none."""
    return Results(
        schema=SCHEMA,
        command=choice.command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        took_s=0.0,
        quick=choice.quick,
        compared=True,
        complete=False,
        machine=place.describe(choice.python),
        runs=[],
        setting=[
            ("model", "a Qwen2.5-VL of 2.2 million random parameters, 256 values of float32 a token (1 KiB)"),
            (
                "servers",
                "undivided: one engine; divided: two encoders, one language instance, a router; each a process "
                "with one thread for arithmetic, all on the cores above, which they share with whoever asks",
            ),
            (
                "pool",
                f"{POOL_BYTES >> 20} MiB, unless said otherwise; the example connector's files are in the "
                "temporary folder",
            ),
            (
                "waiting",
                "processes of vLLM's that wait for each other look without rest for 1 s, as vLLM has it"
                if choice.spin
                else f"processes of vLLM's that wait for each other sleep after {idle_workers.SPIN_S * 1e3:g} ms, in "
                "all configurations alike; vLLM has them look without rest for 1 s",
            ),
            ("answers", "greedy; compared token by token with the undivided engine's, asked one by one"),
        ],
    )


def _one(
    configuration: Configuration,
    choice: Choice,
    turn: int,
    cases: Sequence[Case],
    paths: tuple[Path, Path, Path],
    results: Results,
    report: Report,
) -> None:
    """A configuration that does not come up has rows that say so; so has a scenario, if it ends on the way."""
    taking = []
    for case in cases:
        if reason := skipped(case.scenario, configuration):
            if configuration in choice.configurations and turn == 1:
                run = empty(case.scenario, configuration)
                run.status, run.reason = "skipped", reason
                results.runs.append(run)
        else:
            taking.append(case)
    began, small = time.monotonic(), any(case.scenario.broken == "small pool" for case in taking)

    def say(what: str) -> None:
        report(f"{configuration.title}: {what}", 0)

    try:
        with Stack(configuration, choice.python, *paths, say, small=small, spin=choice.spin) as stack:
            _note_start(results, configuration, time.monotonic() - began)
            _warm(stack)
            if configuration is UNDIVIDED:
                for case in cases:
                    case.answers = case.answers or _asked(stack, case, report)
            if configuration in choice.configurations:
                for case in taking:
                    try:
                        _run(stack, case, choice.quick, turn, results, report)
                    except StartError as error:
                        _failed(configuration, case, turn, error, results, report)
    except StartError as error:
        if configuration is UNDIVIDED:
            raise
        for case in taking:
            _failed(configuration, case, turn, error, results, report)


def _note_start(results: Results, configuration: Configuration, seconds: float) -> None:
    name, said = "seconds to start", f"{configuration.name} {seconds:.0f}"
    facts = dict(results.setting)
    results.setting = [*(facts | {name: ", ".join(filter(None, (facts.get(name), said)))}).items()]


def _failed(
    configuration: Configuration, case: Case, turn: int, error: StartError, results: Results, report: Report
) -> None:
    run = empty(case.scenario, configuration)
    run.round = turn
    run.status, run.reason = "error", str(error)
    results.runs.append(run)
    report(f"{configuration.title}: {error}", len(case.requests))


def _run(stack: Stack, case: Case, quick: bool, turn: int, results: Results, report: Report) -> None:
    scenario, run = case.scenario, empty(case.scenario, stack.configuration)
    run.round = turn
    what = f"{run.title}: {scenario.name}"
    run.plan, run.drawn = scenario.planned(quick), drawn(case.requests)
    run.max_tokens, run.concurrency = scenario.max_tokens, scenario.concurrency

    def ended(sample: Sample) -> None:
        report(what, 1)

    report(what, 0)
    with breaking(scenario, stack, len(case.requests), ended) as broken:
        endpoint = stack.endpoint(scenario.max_tokens, scenario.timeout_s, scenario.concurrency)
        before = counters.read(stack.metrics)
        measured = drive(endpoint, case.requests, case.urls, broken.watch)
        after = counters.read(stack.metrics)
    run.samples, run.duration, run.complete = measured.samples, measured.duration, measured.complete
    run.counters = counters.between(before, after) if after else {}
    run.events = broken.events
    if note := broken.note():
        run.notes.append(note)
    answers.compare(run, case.answers)
    results.runs.append(run)
    if not run.complete:
        raise KeyboardInterrupt


def _asked(stack: Stack, case: Case, report: Report) -> Answers:
    what = f"{stack.configuration.title}: right answers of {case.scenario.name}"
    report(what, 0)
    endpoint = stack.endpoint(case.scenario.max_tokens, case.scenario.timeout_s, 1)
    return answers.ask(endpoint, case.requests, case.urls, Watch(ended=lambda sample: report(what, 1)))


def _warm(stack: Stack) -> None:
    """:raises StartError: it answers nothing."""
    endpoint = stack.endpoint(4, WARM_TIMEOUT_S, 1)
    try:
        answers.ask(endpoint, WARM, [[url(picture) for picture in request.pictures] for request in WARM], Watch())
    except ValueError as error:
        raise StartError(f"started, and then: {error}") from None


def _case(scenario: Scenario, choice: Choice, digest: str) -> Case:
    made = scenario.requests(choice.quick)
    urls = [[url(picture) for picture in request.pictures] for request in made]
    wanted = _reference(scenario, choice, digest)
    known = (each.answers for each in choice.known if msgspec.structs.replace(each, answers={}) == wanted)
    return Case(scenario, made, urls, next(known, {}))


def _reference(scenario: Scenario, choice: Choice, digest: str) -> Reference:
    """Without its answers."""
    return Reference(scenario.name, digest, scenario.planned(choice.quick), scenario.max_tokens, {})


def _digest(model: Path) -> str:
    """Of everything that a model is made of."""
    digest = xxhash.xxh3_128()
    for path in sorted(model.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
