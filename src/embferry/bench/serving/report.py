"""The report of ``embferry bench serve``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..report import NONE, Report, Row, Table, facts
from .counters import COUNTERS
from .results import Run, ServingResults
from .summary import Summary, pooled, summarize

UNREPORTED = "not reported"
COUNTED = ("resumes", "bytes sent twice", "encodes saved")
COLUMNS = (
    *("configuration", "requests", "failed", "wrong", "TTFT p50 ms", "p99", "E2E p50 ms", "p99", "tokens/s"),
    *("resumes", "sent twice", "encodes saved", "longest wait s"),
)
Rounds = list[list[Run]]
"""The runs of one scenario: a list for each configuration, with its rounds."""


def report(results: ServingResults) -> Report:
    if results.compared:
        title = "vLLM, undivided and divided"
        lead = "The same requests to every configuration; each answer is compared with the undivided engine's."
        tables = list(_comparisons(results))
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
        elif not results.compared and run.samples and (s := summarize(run)).failed:
            found.append(f"{name}: {s.errors} of {s.requests} requests failed, {s.wrong} answers are wrong")
    return found


# The comparison


def _comparisons(results: ServingResults) -> Iterator[Table]:
    scenarios: dict[str, dict[str, list[Run]]] = {}
    for run in results.runs:
        scenarios.setdefault(run.scenario, {}).setdefault(run.name, []).append(run)
    grouped = {scenario: list(by_name.values()) for scenario, by_name in scenarios.items()}
    if grouped:
        yield _overview(grouped)
    for scenario, rounds in grouped.items():
        yield _scenario(scenario, rounds)


def _overview(scenarios: dict[str, Rounds]) -> Table:
    """Returns the answer: how long each configuration takes to the first token, and what went wrong, by scenario."""
    cells: dict[str, dict[str, str]] = {}
    bad: set[str] = set()
    for scenario, rounds in scenarios.items():
        for each in rounds:
            run = pooled(each)
            text = "did not start" if run.status == "error" else NONE
            if run.samples:
                s = summarize(run)
                text = f"{_ms(s.ttft.median)} ({s.longest_wait:.1f} s)"
                text += f", {s.errors} failed" if s.errors else ""
                text += f", {s.wrong} wrong" if s.wrong else ""
                bad |= {run.title} if s.failed else set()
            cells.setdefault(run.title, {})[scenario] = text
    rows = (
        Row((title, *(found.get(scenario, NONE) for scenario in scenarios)), "bad" if title in bad else "")
        for title, found in cells.items()
    )
    note = "Median time to first token in ms, of right answers, and the longest wait of any request; failures."
    return Table("Which configuration", ("configuration", *scenarios), tuple(rows), note)


def _scenario(scenario: str, rounds: Rounds) -> Table:
    several = max(map(len, rounds)) > 1
    columns = (*COLUMNS, "TTFT p50 of each round") if several else COLUMNS
    runs = [run for each in rounds for run in each]
    return Table(scenario, columns, tuple(_row(each, several) for each in rounds), _workload_note(runs))


def _row(rounds: list[Run], several: bool) -> Row:
    run = pooled(rounds)
    if run.status == "skipped":
        return Row((run.title, run.reason), "skipped")
    if run.status != "ok" or not run.samples:
        reason = run.reason or ("no request has ended" if run.complete else "interrupted before a request had ended")
        return Row((run.title, f"ERROR: {reason}"), "error")
    s = summarize(run)
    cells = (
        run.title + ("" if run.complete else " (incomplete)"),
        str(s.requests),
        str(s.errors),
        NONE if all(sample.wrong is None for sample in run.samples) else str(s.wrong),
        _ms(s.ttft.median),
        _ms(s.ttft.p99),
        _ms(s.e2el.median),
        _ms(s.e2el.p99),
        f"{s.output_throughput:.1f}",
        *(_counted(run, name) if run.counters else NONE for name in COUNTED),
        f"{s.longest_wait:.2f}",
    )
    if several:
        cells += (", ".join(_ms(summarize(each).ttft.median) for each in rounds if each.samples),)
    kind = "ours" if run.name.startswith("ours") else "limit" if run.name == "undivided" else "engine"
    return Row(cells, "bad" if s.failed else kind)


def _workload_note(runs: Sequence[Run]) -> str:
    ran = next((run for run in runs if run.samples and run.plan is not None), None)
    if ran is None:
        return ""
    facts = "; ".join(f"{name} {value}" for name, value in _workload(ran)[:5])
    return (
        f"{facts[0].upper()}{facts[1:]}; answers of {ran.max_tokens} tokens. Times and tokens/s are of right answers."
    )


def _notes(run: Run) -> Iterator[str]:
    """Yields what was damaged, until when requests went wrong after that, and why they failed."""
    yield from (f"{run.scenario}: {note}" for note in run.notes)
    where = f"{run.title}, {run.scenario}, round {run.round}"
    after = run.damaged_at
    if after is not None and (bad := [s.began for s in run.samples if not s.right and s.ended > after]):
        recovered = any(s.right and s.began > max(bad) for s in run.samples)
        when = f"{max(0.0, max(bad) - after):.1f} s later" if recovered else "the end of the run"
        yield f"{where}: requests went wrong until {when}"
    for reason, count in Counter(sample.error for sample in run.samples if sample.error).most_common():
        yield f"{where}: {count} failed: {reason}"


# One endpoint


def _endpoint(run: Run) -> Iterator[Table]:
    if not run.samples:
        yield Table(run.title, ("figure", "value"), (Row(("failed", run.reason or "no request has ended"), "error"),))
        return
    s = summarize(run)
    planned = run.drawn.requests if run.drawn is not None else 0
    note = "" if run.complete else f"Interrupted: {s.requests} of {planned} requests had ended."
    yield Table(run.title, ("figure", "value"), tuple(map(Row, _totals(run, s))), note)
    spreads = (("TTFT", s.ttft), ("TPOT", s.tpot), ("ITL", s.itl), ("E2EL", s.e2el))
    times = tuple(Row((name, _ms(each.mean), _ms(each.median), _ms(each.p99))) for name, each in spreads)
    yield Table("Times in ms, of right answers", ("time", "mean", "median", "p99"), times)
    reasons = Counter(sample.error for sample in run.samples if sample.error)
    if reasons:
        rows = tuple(Row((reason, str(count)), "bad") for reason, count in reasons.most_common())
        yield Table("Why requests failed", ("reason", "requests"), rows)
    if run.plan is not None:
        yield Table("Workload", ("property", "value"), tuple(map(Row, _workload(run))))


def _totals(run: Run, s: Summary) -> list[tuple[str, str]]:
    wrong = f", {s.wrong} of them with a wrong answer" if any(x.wrong is not None for x in run.samples) else ""
    return [
        ("successful requests", str(s.successful)),
        ("failed requests", f"{s.failed}{wrong}"),
        ("duration", f"{s.duration:.2f} s"),
        ("input tokens", UNREPORTED if s.input_tokens is None else f"{s.input_tokens:,}"),
        ("output tokens", f"{s.output_tokens:,}"),
        ("request throughput", f"{s.request_throughput:.2f}/s"),
        ("output token throughput", f"{s.output_throughput:.2f}/s"),
        ("total token throughput", UNREPORTED if s.total_throughput is None else f"{s.total_throughput:.2f}/s"),
        ("longest wait", f"{s.longest_wait:.2f} s"),
        *((counter.name, _counted(run, counter.name)) for counter in COUNTERS),
    ]


def _workload(run: Run) -> list[tuple[str, str]]:
    """Returns what was asked for, and what was drawn."""
    plan, drawn = run.plan, run.drawn
    assert plan is not None
    assert drawn is not None
    rate = "all at once" if plan.rate is None else f"{plan.rate:g} a second"
    cv = NONE if drawn.cv is None else f"{drawn.cv:.2f}"
    return [
        ("requests", f"{drawn.requests}, {rate}, {run.concurrency or 'any number'} at once"),
        ("gaps' coefficient of variation", f"{plan.burstiness_cv:g} asked for, {cv} drawn"),
        ("visual tokens a picture, p50/p90/largest", "/".join(f"{value:.0f}" for value in drawn.tokens)),
        ("pictures a request, p50/p90/p99", "/".join(f"{value:.0f}" for value in drawn.images)),
        ("pictures", f"{drawn.pictures}, {drawn.distinct} of them distinct, {drawn.repeated:.0%} sent before"),
        ("caps", f"{plan.max_images} pictures of {plan.max_image_tokens} tokens; answers of {run.max_tokens} tokens"),
        ("seed", str(plan.seed)),
    ]


def _counted(run: Run, name: str) -> str:
    value = run.counters.get(name)
    if value is None:
        return UNREPORTED
    unit = next(counter.unit for counter in COUNTERS if counter.name == name)
    if unit == "s":
        return f"{value:.2f} s"
    return f"{value / 1e6:.2f} MB" if unit == "B" and value else f"{value:,.0f}"


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value * 1e3:.0f}" if value >= 0.1 else f"{value * 1e3:.1f}"
