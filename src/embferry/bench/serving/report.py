"""What is shown of results, as tables of text: for terminal and Markdown alike. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from ..report import NONE, Row, Table
from .counters import COUNTERS
from .results import Results, Run, Sample
from .summary import Spread, Summary, pooled, right_again, summarize

UNREPORTED = "not reported"
COUNTED = ("resumes", "bytes sent twice", "encodes saved")
COMPARED = (
    "configuration",
    "requests",
    "failed",
    "wrong",
    "TTFT p50 ms",
    "p99",
    "E2E p50 ms",
    "p99",
    "tokens/s",
    "resumes",
    "sent twice",
    "encodes saved",
    "longest wait s",
)
ROUNDS = ("configuration", "each round", "median")


def facts(results: Results) -> list[tuple[str, str]]:
    """When, where, with what."""
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m.versions.items() if version)
    return [
        ("command", results.command),
        ("date", f"{results.started}, {results.took_s:.0f} s" + (", quick" if results.quick else "")),
        ("machine", f"{m.cpu}, {m.cores} cores, {m.memory_bytes / 1e9:.0f} GB, {m.kernel}"),
        ("versions", versions),
        *results.setting,
        *([] if results.complete else [("incomplete", "it was interrupted")]),
    ]


def tables(results: Results) -> list[Table]:
    if results.compared:
        return list(comparisons(results))
    return [table for run in results.runs for table in alone(run)]


def alone(run: Run) -> Iterator[Table]:
    """One endpoint, as ``vllm bench serve`` shows it."""
    if run.drawn is not None:
        yield Table("Requests", ("what", "value"), tuple(Row(cells) for cells in workload(run)))
    if not run.samples:
        yield Table(run.title, ("what", "value"), (Row(("failed", run.reason or "no request has ended"), "error"),))
        return
    s = summarize(run)
    note = "" if run.complete else f"interrupted: incomplete, {s.requests} of {_planned(run)} requests had ended"
    yield Table(run.title, ("what", "value"), tuple(Row(cells) for cells in _totals(run, s)), note)
    spreads = (("TTFT", s.ttft), ("TPOT", s.tpot), ("ITL", s.itl), ("E2EL", s.e2el))
    yield Table(
        "Times in ms, of right answers",
        ("what", "mean", "median", "p99"),
        tuple(Row((name, *(_ms(value) for value in _values(spread)))) for name, spread in spreads),
    )
    reasons = _reasons(run)
    if reasons:
        yield Table("Why requests failed", ("reason", "requests"), tuple(Row(cells, "no") for cells in reasons))


def workload(run: Run) -> list[tuple[str, str]]:
    """What was asked for, and what the draw made of it."""
    plan, drawn = run.plan, run.drawn
    assert plan is not None
    assert drawn is not None
    caps = f"at most {plan.max_images} pictures of {plan.max_image_tokens} tokens"
    rate = "all at once" if plan.rate is None else f"{plan.rate:g} a second"
    return [
        ("requests", f"{drawn.requests}, {rate}, {run.concurrency or 'any number'} at once"),
        ("gaps' coefficient of variation", f"{plan.burstiness_cv:g} asked for, {_number(drawn.cv, '.2f')} drawn"),
        ("visual tokens a picture, p50/p90/largest", "/".join(f"{value:.0f}" for value in drawn.tokens)),
        ("pictures a request, p50/p90/p99", "/".join(f"{value:.0f}" for value in drawn.images)),
        ("pictures", f"{drawn.pictures}, {drawn.distinct} of them distinct, {drawn.repeated:.0%} sent before"),
        ("caps", f"{caps}; answers of {run.max_tokens} tokens"),
        ("seed", str(plan.seed)),
    ]


def comparisons(results: Results) -> Iterator[Table]:
    """One table a scenario, the configurations in their order."""
    scenarios = dict.fromkeys(run.scenario for run in results.runs)
    for scenario in scenarios:
        runs = [run for run in results.runs if run.scenario == scenario]
        names = dict.fromkeys(run.name for run in runs)
        rounds = [[run for run in runs if run.name == name] for name in names]
        yield Table(scenario, COMPARED, tuple(_row(pooled(each)) for each in rounds), _note(runs))
        if max(map(len, rounds)) > 1:
            yield Table("Round by round, TTFT p50 ms", ROUNDS, tuple(_by_round(each) for each in rounds))
        yield from _what_happened(runs)


def _by_round(rounds: Sequence[Run]) -> Row:
    medians = [s.ttft.median for run in rounds if run.samples and (s := summarize(run)).ttft is not None]
    cells = (rounds[0].title, ", ".join(map(_ms, medians)) or NONE, _ms(median(medians)) if medians else NONE)
    return Row(cells, "ours" if rounds[0].name.startswith("ours") else "engine")


def notes(results: Results) -> list[str]:
    """Of each run that has some."""
    return [f"{run.title}, {run.scenario}: {note}" for run in results.runs for note in run.notes]


def problems(results: Results) -> list[str]:
    """What did not go as it should, where nothing was broken on purpose."""
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


def _row(run: Run) -> Row:
    if run.status != "ok" or not run.samples:
        kind = "skipped" if run.status == "skipped" else "error"
        reason = run.reason or ("no request has ended" if run.complete else "interrupted before a request had ended")
        words = (run.title, reason if kind == "skipped" else f"ERROR: {reason}")
        return Row(words + ("",) * (len(COMPARED) - 2), kind)
    s = summarize(run)
    cells = (
        run.title + ("" if run.complete else " (incomplete)"),
        str(s.requests),
        str(s.errors),
        NONE if all(sample.wrong is None for sample in run.samples) else str(s.wrong),
        *(_ms(value) for value in _values(s.ttft)[1:]),
        *(_ms(value) for value in _values(s.e2el)[1:]),
        f"{s.output_throughput:.1f}",
        *(_counted(run, name) if run.counters else NONE for name in COUNTED),
        f"{s.longest_wait:.2f}",
    )
    return Row(cells, _kind(run, s))


def _kind(run: Run, s: Summary) -> str:
    if s.failed:
        return "no"
    return "ours" if run.name.startswith("ours") else "limit" if run.name == "undivided" else "engine"


def _note(runs: Sequence[Run]) -> str:
    ran = next((run for run in runs if run.samples), None)
    if ran is None or ran.plan is None or ran.drawn is None:
        return ""
    shares = "; ".join(f"{name} {value}" for name, value in workload(ran)[:5])
    return f"{shares}; answers of {ran.max_tokens} tokens; times and tokens/s are of right answers"


def _what_happened(runs: Sequence[Run]) -> Iterator[Table]:
    """Requests one by one, where there are few; else, from the first event on, who suffered."""
    ran = [run for run in runs if run.samples]
    if ran and max(len(run.samples) for run in ran) <= 3:
        rows = [
            Row(
                (
                    _titled(run),
                    str(sample.number + 1),
                    str(sample.image_tokens),
                    f"{sample.latency:.2f}",
                    _outcome(sample),
                )
            )
            for run in ran
            for sample in run.samples
        ]
        yield Table("One by one", ("configuration", "request", "visual tokens", "s", "outcome"), tuple(rows))
    broken = [run for run in ran if run.events]
    if broken:
        yield Table(
            "From then on",
            (
                "configuration",
                "what was done",
                "requests after",
                "failed",
                "wrong",
                "longest wait s",
                "right again after s",
            ),
            tuple(map(_after, broken)),
        )


def _after(run: Run) -> Row:
    at = run.events[0].at
    after = [sample for sample in run.samples if sample.ended > at]
    failed = sum(not sample.answered for sample in after)
    wrong = sum(sample.answered and bool(sample.wrong) for sample in after)
    share = f" ({failed / len(after):.0%})" if failed else ""
    waits = [sample.latency for sample in after]
    again = right_again(run)
    cells = (
        _titled(run),
        "; ".join(f"at {event.at:.1f} s {event.what}" for event in run.events[:2]),
        str(len(after)),
        f"{failed}{share}",
        str(wrong),
        f"{max(waits, default=0):.2f}",
        "all along" if not failed + wrong else "not within the run" if again is None else f"{again:.2f}",
    )
    return Row(cells, "no" if failed or wrong else "yes")


def _titled(run: Run) -> str:
    return run.title if run.round == 1 else f"{run.title}, round {run.round}"


def _outcome(sample: Sample) -> str:
    if sample.error:
        return f"failed: {sample.error}"
    return {True: "wrong answer", False: "right", None: "answered"}[sample.wrong]


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


def _reasons(run: Run) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for sample in run.samples:
        if sample.error:
            counts[sample.error] = counts.get(sample.error, 0) + 1
    return [(reason, str(count)) for reason, count in sorted(counts.items(), key=lambda item: -item[1])]


def _counted(run: Run, name: str) -> str:
    value = run.counters.get(name)
    if value is None:
        return UNREPORTED
    unit = next((counter.unit for counter in COUNTERS if counter.name == name), "")
    if unit == "s":
        return f"{value:.2f} s"
    return f"{value / 1e6:.2f} MB" if unit == "B" and value else f"{value:,.0f}"


def _planned(run: Run) -> int:
    return run.drawn.requests if run.drawn is not None else 0


def _values(spread: Spread | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if spread is None else (spread.mean, spread.median, spread.p99)


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value * 1e3:.0f}" if value >= 0.1 else f"{value * 1e3:.1f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
