"""The report of ``embferry bench serve``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..report import NONE, Report, Row, Table, cells, facts, pairs
from . import counters, ratios
from .results import Run, ServingResults, pooled
from .workload import drawn, requests

UNREPORTED = "not reported"
Columns = Mapping[str, Callable[[Run], str]]
Scenarios = dict[str, dict[str, list[Run]]]
"""Rounds by the title of the scenario and the name of the configuration."""


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value * 1e3:.0f}" if value >= 0.1 else f"{value * 1e3:.1f}"


def _counted(run: Run, name: str) -> str:
    value = run.counters.get(name)
    return UNREPORTED if value is None else counters.text(name, value)


def _counter(name: str) -> Callable[[Run], str]:
    return lambda run: _counted(run, name) if run.counters else NONE


# A name that stands twice has a blank after it, which is not shown.
COMPARED: Columns = {
    "configuration": lambda run: run.title + ("" if run.complete else " (incomplete)"),
    "requests": lambda run: str(len(run.samples)),
    "failed": lambda run: str(run.errors),
    "wrong": lambda run: str(run.wrong) if _was_compared(run) else NONE,
    "TTFT p50 ms": lambda run: _ms(run.times["TTFT"].median),
    "p99": lambda run: _ms(run.times["TTFT"].p99),
    "E2E p50 ms": lambda run: _ms(run.times["E2EL"].median),
    "p99 ": lambda run: _ms(run.times["E2EL"].p99),
    "tokens/s": lambda run: f"{run.rate(run.output_tokens):.1f}",
    "resumes": _counter("resumes"),
    "sent twice": _counter("bytes sent twice"),
    "encodes saved": _counter("encodes saved"),
    "longest wait s": lambda run: f"{run.longest_wait:.2f}",
}
TOTALS: Columns = {
    "successful requests": lambda run: str(len(run.right)),
    "failed requests": lambda run: (
        str(run.errors + run.wrong) + (f", {run.wrong} of them with a wrong answer" if _was_compared(run) else "")
    ),
    "duration": lambda run: f"{run.duration:.2f} s",
    "input tokens": lambda run: UNREPORTED if run.input_tokens is None else f"{run.input_tokens:,}",
    "output tokens": lambda run: f"{run.output_tokens:,}",
    "request throughput": lambda run: f"{run.rate(len(run.right)):.2f}/s",
    "output token throughput": lambda run: f"{run.rate(run.output_tokens):.2f}/s",
    "total token throughput": lambda run: (
        UNREPORTED if run.input_tokens is None else f"{run.rate(run.input_tokens + run.output_tokens):.2f}/s"
    ),
    "longest wait": lambda run: f"{run.longest_wait:.2f} s",
}


def report(results: ServingResults) -> Report:
    if results.compared:
        title = f"{results.engine}, undivided and divided"
        lead = "The same requests to every configuration; each answer is compared with the undivided engine's."
        scenarios: Scenarios = {}
        for run in results.runs:
            scenarios.setdefault(run.scenario, {}).setdefault(run.name, []).append(run)
        tables = ratios.tables(scenarios) if results.side_by_side else []
        tables += [_overview(scenarios)] if scenarios else []
        tables += [_scenario(name, list(by_name.values())) for name, by_name in scenarios.items()]
    else:
        title, lead = "A chat endpoint under a load of pictures", "The figures of vllm bench serve, by its definitions."
        tables = [table for run in results.runs for table in _endpoint(run)]
    return Report(
        verb="bench serve",
        title=title,
        lead=lead,
        facts=facts(results) + results.setting,
        tables=tables,
        notes=list(dict.fromkeys(note for run in results.runs for note in _notes(run))) if results.compared else [],
        problems=problems(results),
    )


def problems(results: ServingResults) -> list[str]:
    """Returns what failed where nothing was damaged on purpose."""
    found = []
    for run in results.runs:
        name = ", ".join(filter(None, (run.title, run.scenario)))
        if run.status == "error":
            found.append(f"{name}: {run.reason}")
        elif not run.complete:
            found.append(f"{name}: interrupted")
        elif not results.compared and run.errors + run.wrong:
            total = len(run.samples)
            found.append(f"{name}: {run.errors} of {total} requests failed, {run.wrong} answers are wrong")
    return found


# The comparison


def _overview(scenarios: Scenarios) -> Table:
    """Returns the answer: how long each configuration takes to the first token, and what went wrong, by scenario."""
    found: dict[str, dict[str, str]] = {}
    bad: set[str] = set()
    for scenario, by_name in scenarios.items():
        for rounds in by_name.values():
            run = pooled(rounds)
            text = "did not start" if run.status == "error" else NONE
            if run.samples:
                failed = ((run.errors, "failed"), (run.wrong, "wrong"))
                text = f"{_ms(run.times['TTFT'].median)} ({run.longest_wait:.1f} s)"
                text += "".join(f", {count} {what}" for count, what in failed if count)
                bad |= {run.title} if run.errors + run.wrong else set()
            found.setdefault(run.title, {})[scenario] = text
    rows = [
        Row((title, *(texts.get(scenario, NONE) for scenario in scenarios)), "bad" if title in bad else "")
        for title, texts in found.items()
    ]
    note = "Median time to first token in ms, of right answers, and the longest wait of any request; failures."
    return Table("Which configuration", ("configuration", *scenarios), tuple(rows), note)


def _scenario(scenario: str, by_configuration: Sequence[list[Run]]) -> Table:
    ran = next((run for rounds in by_configuration for run in rounds if run.samples and run.plan is not None), None)
    note = ""
    if ran is not None:
        workload = "; ".join(f"{name} {value}" for name, value in _workload(ran)[:5])
        note = f"{workload[0].upper()}{workload[1:]}; answers of {ran.max_tokens} tokens. "
        note += "Times and tokens/s are of right answers."
    several = max(map(len, by_configuration)) > 1
    columns = tuple(name.strip() for name in COMPARED) + (("TTFT p50 of each round",) if several else ())
    return Table(scenario, columns, tuple(_row(rounds, several) for rounds in by_configuration), note)


def _row(rounds: list[Run], several: bool) -> Row:
    run = pooled(rounds)
    if run.status == "skipped":
        return Row((run.title, run.reason), "skipped")
    if run.status != "ok" or not run.samples:
        reason = run.reason or ("no request has ended" if run.complete else "interrupted before a request had ended")
        return Row((run.title, f"ERROR: {reason}"), "error")
    each = (", ".join(_ms(one.times["TTFT"].median) for one in rounds if one.samples),) if several else ()
    _, p50, p99 = run.times["TTFT"]
    bar = None if p50 is None or p99 is None else (p50, p50, p99)
    return Row(cells(COMPARED, run) + each, "bad" if run.errors + run.wrong else ratios.kind(run.name), bar)


def _notes(run: Run) -> Iterator[str]:
    """Yields what was damaged, until when requests went wrong after that, and why they failed."""
    yield from (f"{run.scenario}: {note}" for note in run.notes)
    where = f"{run.title}, {run.scenario}, round {run.round}"
    after = run.damaged_at
    if after is not None and (bad := [s.began for s in run.samples if not s.right and s.ended > after]):
        recovered = any(s.right and s.began > max(bad) for s in run.samples)
        when = f"{max(0.0, max(bad) - after):.1f} s later" if recovered else "the end of the run"
        yield f"{where}: requests went wrong until {when}"
    for reason, count in _reasons(run):
        yield f"{where}: {count} failed: {reason}"


# One endpoint


def _endpoint(run: Run) -> Iterator[Table]:
    if not run.samples:
        yield pairs(run.title, ("figure", "value"), [("failed", run.reason or "no request has ended")], kind="error")
        return
    planned = run.plan.requests if run.plan else 0
    totals = [*zip(TOTALS, cells(TOTALS, run), strict=True)]
    totals += [(name, _counted(run, name)) for name in counters.COUNTERS]
    note = "" if run.complete else f"Interrupted: {len(run.samples)} of {planned} requests had ended."
    yield pairs(run.title, ("figure", "value"), totals, note)
    times = [Row((name, _ms(each.mean), _ms(each.median), _ms(each.p99))) for name, each in run.times.items()]
    yield Table("Times in ms, of right answers", ("time", "mean", "median", "p99"), tuple(times))
    if reasons := _reasons(run):
        rows = [(reason, str(count)) for reason, count in reasons]
        yield pairs("Why requests failed", ("reason", "requests"), rows, kind="bad")
    if run.plan is not None:
        yield pairs("Workload", ("property", "value"), _workload(run))


def _workload(run: Run) -> list[tuple[str, str]]:
    """Returns what was asked for, and what was drawn."""
    plan = run.plan
    assert plan is not None
    found = drawn(requests(plan))
    rate = "all at once" if plan.rate is None else f"{plan.rate:g} a second"
    cv = NONE if found.cv is None else f"{found.cv:.2f}"
    return [
        ("requests", f"{found.requests}, {rate}, {run.concurrency or 'any number'} at once"),
        ("gaps' coefficient of variation", f"{plan.burstiness_cv:g} asked for, {cv} drawn"),
        ("visual tokens a picture, p50/p90/largest", "/".join(f"{value:.0f}" for value in found.tokens)),
        ("pictures a request, p50/p90/p99", "/".join(f"{value:.0f}" for value in found.images)),
        ("pictures", f"{found.pictures}, {found.distinct} of them distinct, {found.repeated:.0%} sent before"),
        ("caps", f"{plan.max_images} pictures of {plan.max_image_tokens} tokens; answers of {run.max_tokens} tokens"),
        ("seed", str(plan.seed)),
    ]


def _reasons(run: Run) -> list[tuple[str, int]]:
    return Counter(sample.error for sample in run.samples if sample.error).most_common()


def _was_compared(run: Run) -> bool:
    return any(sample.wrong is not None for sample in run.samples)
