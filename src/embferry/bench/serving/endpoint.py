"""One workload against one endpoint that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..results import Progress, load
from . import answers, documents
from .client import Endpoint, send_all
from .results import Run, ServingResults
from .workload import Plan, requests


def measure_endpoint(
    plan: Plan, endpoint: Endpoint, verify: str, metrics: Sequence[str], results: ServingResults, progress: Progress
) -> None:
    """Adds a run to ``results``. Its answers are compared with ``verify``: an undivided endpoint, or earlier results.

    Raises:
        ValueError: there is nothing to compare the answers with.
    """
    known: answers.Answers = {}
    if verify and not is_url(verify):
        try:
            known = answers.earlier(load(Path(verify), ServingResults), plan, endpoint.max_tokens)
        except OSError as error:
            raise ValueError(f"{verify} is neither a URL nor a file with results: {error}") from error
    results.setting.append(("server", server_version(endpoint.url)))
    progress("drawing pictures", 0)
    run, made = Run(endpoint.url, f"{endpoint.model} at {endpoint.url}", plan=plan), requests(plan)
    results.runs.append(run)
    send_all(endpoint, made, run, lambda sample: progress("asking", 1), metrics=metrics)
    if is_url(verify):
        reference = msgspec.structs.replace(endpoint, url=verify.rstrip("/"))
        try:
            known = answers.ask(reference, made, lambda sample: progress("comparing answers", 1))
        except KeyboardInterrupt:
            run.complete = False
            run.notes.append("interrupted before the answers were compared")
            raise
    answers.compare(run, known)


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def first_model(endpoint: Endpoint) -> str:
    """Returns the first model that the endpoint lists.

    Raises:
        ValueError: it lists none, or does not answer.
    """
    where = f"{endpoint.url}/v1/models"
    try:
        return str(msgspec.json.decode(documents.read(where, 10, endpoint.headers))["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{where} lists no model ({error}); start the server, or name one: --model") from error


def server_version(where: str) -> str:
    """Returns the version that vLLM's servers tell."""
    try:
        return str(msgspec.json.decode(documents.read(f"{where}/version", 5))["version"])
    except (OSError, ValueError, LookupError, TypeError):
        return "does not tell its version"


def verify_earlier(shown: ServingResults, known: ServingResults) -> None:
    """Compares the answers of each run with those to the same requests in other results.

    Raises:
        ValueError: these results are of other requests.
    """
    for run in shown.runs:
        if run.plan is not None and run.samples:
            answers.compare(run, answers.earlier(known, run.plan, run.max_tokens))
