"""One workload against one endpoint that is there already."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec

from . import answers, counters, place, results
from .compare import Report
from .driver import Endpoint, Watch, drive
from .pictures import url
from .results import SCHEMA, Results, Run
from .workload import Plan, drawn, requests


class Choice(msgspec.Struct, frozen=True):
    """What the user asked for."""

    plan: Plan
    endpoint: Endpoint
    verify: str = ""
    """The URL of an undivided endpoint, or a file with earlier results; empty: answers are not compared."""
    metrics: tuple[str, ...] = ()
    command: str = ""


def work(choice: Choice) -> int:
    """Requests, those that are asked again to compare included."""
    return choice.plan.requests * (2 if is_url(choice.verify) else 1)


def measure(choice: Choice, report: Report) -> Results:
    """:raises ValueError: there is nothing to compare the answers with."""
    began, started = time.monotonic(), datetime.now(UTC)
    # What is to be compared with is looked at first: its absence should not cost a run.
    known = None if is_url(choice.verify) or not choice.verify else _earlier(choice)
    report("drawing pictures", 0)
    made = requests(choice.plan)
    urls = [[url(picture) for picture in request.pictures] for request in made]
    where = choice.endpoint.url
    run = Run(
        name=where,
        title=f"{choice.endpoint.model} at {where}",
        plan=choice.plan,
        drawn=drawn(made),
        max_tokens=choice.endpoint.max_tokens,
        concurrency=choice.endpoint.concurrency,
    )
    before = counters.read(choice.metrics)
    measured = drive(choice.endpoint, made, urls, Watch(ended=lambda sample: report("asking", 1)))
    run.counters = counters.between(before, counters.read(choice.metrics))
    run.samples, run.duration, run.complete = measured.samples, measured.duration, measured.complete
    if run.complete and is_url(choice.verify):
        reference = msgspec.structs.replace(choice.endpoint, url=choice.verify.rstrip("/"))
        try:
            known = answers.ask(reference, made, urls, Watch(ended=lambda sample: report("comparing answers", 1)))
        except KeyboardInterrupt:
            run.complete = False
            run.notes.append("interrupted before the answers were compared")
    if known is not None:
        answers.compare(run, known)
    return Results(
        schema=SCHEMA,
        command=choice.command,
        started=started.isoformat(timespec="seconds"),
        took_s=round(time.monotonic() - began, 1),
        quick=False,
        compared=False,
        complete=run.complete,
        machine=place.describe(),
        runs=[run],
        setting=[("server", server_version(where))],
    )


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def server_version(where: str) -> str:
    """As vLLM tells it."""
    try:
        answer = httpx.get(f"{where}/version", timeout=5, trust_env=False)
        return str(answer.json()["version"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return "does not tell its version"


def _earlier(choice: Choice) -> answers.Answers:
    try:
        return answers.earlier(results.load(Path(choice.verify)), choice.plan, choice.endpoint.max_tokens)
    except OSError as error:
        raise ValueError(f"{choice.verify} is neither a URL nor a file with results: {error}") from error


def verify(shown: Results, known: Results) -> None:
    """Compares the answers of each run with those of the same requests in other results.

    :raises ValueError: these have not had the same requests."""
    for run in shown.runs:
        if run.plan is not None and run.samples:
            answers.compare(run, answers.earlier(known, run.plan, run.max_tokens))
