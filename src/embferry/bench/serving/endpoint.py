"""One workload against one endpoint that is there already."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec

from .. import results as files
from ..results import Progress
from . import answers, counters
from .client import Callbacks, Endpoint, send_all
from .pictures import url
from .results import Run, ServingResults
from .workload import Plan, drawn, requests


class Choice(msgspec.Struct, frozen=True):
    """Options of the user."""

    plan: Plan
    endpoint: Endpoint
    verify: str = ""
    """The URL of an undivided endpoint, or a file with earlier results; empty if answers are not compared."""
    metrics: tuple[str, ...] = ()
    """URLs of metrics."""


def total_requests(choice: Choice) -> int:
    """Returns the number of requests, with those that are sent again to compare."""
    return choice.plan.requests * (2 if is_url(choice.verify) else 1)


def measure(choice: Choice, results: ServingResults, progress: Progress) -> None:
    """Adds a run to ``results``.

    Raises:
        ValueError: there is nothing to compare the answers with.
    """
    known = _earlier(choice) if choice.verify and not is_url(choice.verify) else None
    where = choice.endpoint.url
    results.setting.append(("server", server_version(where)))
    progress("drawing pictures", 0)
    made = requests(choice.plan)
    urls = [[url(picture) for picture in request.pictures] for request in made]
    run = Run(
        name=where,
        title=f"{choice.endpoint.model} at {where}",
        plan=choice.plan,
        drawn=drawn(made),
        max_tokens=choice.endpoint.max_tokens,
        concurrency=choice.endpoint.concurrency,
    )
    results.runs.append(run)
    before = counters.read(choice.metrics)
    measured = send_all(choice.endpoint, made, urls, Callbacks(ended=lambda sample: progress("asking", 1)))
    run.counters = counters.between(before, counters.read(choice.metrics))
    run.samples, run.duration, run.complete = measured.samples, measured.duration, measured.complete
    if not run.complete:
        raise KeyboardInterrupt
    if is_url(choice.verify):
        reference = msgspec.structs.replace(choice.endpoint, url=choice.verify.rstrip("/"))
        try:
            known = answers.ask(reference, made, urls, Callbacks(ended=lambda sample: progress("comparing answers", 1)))
        except KeyboardInterrupt:
            run.complete = False
            run.notes.append("interrupted before the answers were compared")
            raise
    if known is not None:
        answers.compare(run, known)


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def server_version(where: str) -> str:
    """Returns the version that vLLM's servers tell."""
    try:
        answer = httpx.get(f"{where}/version", timeout=5, trust_env=False)
        return str(answer.json()["version"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return "does not tell its version"


def verify(shown: ServingResults, known: ServingResults) -> None:
    """Compares the answers of each run with those to the same requests in other results.

    Raises:
        ValueError: these results are of other requests.
    """
    for run in shown.runs:
        if run.plan is not None and run.samples:
            answers.compare(run, answers.earlier(known, run.plan, run.max_tokens))


def _earlier(choice: Choice) -> answers.Answers:
    try:
        known = files.load(Path(choice.verify), ServingResults)
    except OSError as error:
        raise ValueError(f"{choice.verify} is neither a URL nor a file with results: {error}") from error
    return answers.earlier(known, choice.plan, choice.endpoint.max_tokens)
