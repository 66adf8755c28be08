"""``embferry bench serve``: any OpenAI-compatible chat endpoint under a multimodal workload, and vLLM's ways to split
compared."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embferry.cli.options import fail

if TYPE_CHECKING:
    from embferry.bench.serving.compare import Choice as Comparison
    from embferry.bench.serving.results import Results

SOME_FAILED, INTERRUPTED = 1, 130
WORKLOAD, ASKED, COMPARED, SHOWN = "Workload", "Endpoint", "Comparison", "Results"


def command(
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="The endpoint, without /v1.", rich_help_panel=ASKED)
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The first it names, if not given.", rich_help_panel=ASKED)
    ] = None,
    api_key: Annotated[
        str, typer.Option(help="The endpoint's key.", envvar="OPENAI_API_KEY", rich_help_panel=ASKED)
    ] = "",
    extra: Annotated[
        str,
        typer.Option(
            metavar="JSON", help="More of each request's body: '{\"ignore_eos\": true}'.", rich_help_panel=ASKED
        ),
    ] = "{}",
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="For one request.", rich_help_panel=ASKED)
    ] = 120.0,
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Where servers count what they do; may be repeated.", rich_help_panel=ASKED),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            metavar="URL|FILE",
            help="An undivided endpoint, or earlier results: another answer is a failure.",
            rich_help_panel=ASKED,
        ),
    ] = "",
    requests: Annotated[int, typer.Option(min=1, help="How many.", rich_help_panel=WORKLOAD)] = 100,
    rate: Annotated[
        float, typer.Option(help="Requests a second, on average; inf: all at once.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    burstiness_cv: Annotated[
        float,
        typer.Option(
            min=0, help="Coefficient of variation of the gaps: 1 is Poisson, 4.9 bursty.", rich_help_panel=WORKLOAD
        ),
    ] = 1.0,
    concurrency: Annotated[
        int, typer.Option(min=0, help="Requests under way at once; 0: any number.", rich_help_panel=WORKLOAD)
    ] = 0,
    repeated: Annotated[
        float,
        typer.Option(min=0, max=0.8, help="Share of pictures that were sent before.", rich_help_panel=WORKLOAD),
    ] = 0.0,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures a request.", rich_help_panel=WORKLOAD)] = 9,
    max_image_tokens: Annotated[
        int, typer.Option(min=4, help="Visual tokens a picture.", rich_help_panel=WORKLOAD)
    ] = 1280,
    side: Annotated[
        int,
        typer.Option(
            min=1, help="Pixels a side of a visual token: 28 for Qwen2.5-VL, 32 for Qwen3-VL.", rich_help_panel=WORKLOAD
        ),
    ] = 28,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer.", rich_help_panel=WORKLOAD)] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.", rich_help_panel=WORKLOAD)] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Start vLLM, undivided and divided in each way, and compare.", rich_help_panel=COMPARED
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Configurations or scenarios, such as ours-tcp, ours*, killed; may be repeated.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often all of it is done, by turns.", rich_help_panel=COMPARED)
    ] = 1,
    spin: Annotated[
        bool,
        typer.Option(
            "--spin",
            help="Leave vLLM's processes looking for messages without rest: on few cores they fill them.",
            rich_help_panel=COMPARED,
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few requests of each.", rich_help_panel=COMPARED)] = False,
    python: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="The Python that has vLLM; this one, if not given.", rich_help_panel=COMPARED
        ),
    ] = sys.executable,
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the servers' logs there.", rich_help_panel=COMPARED)
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where serve.json goes: every sample.", rich_help_panel=SHOWN)
    ] = Path("bench-results"),
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.", rich_help_panel=SHOWN)
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure nothing: show an earlier serve.json.", rich_help_panel=SHOWN),
    ] = None,
) -> None:
    """Drive a chat endpoint with pictures as they come in practice; or compare vLLM's ways to split, side by side."""
    if [url is not None, compare, show is not None].count(True) != 1:
        fail("give one of --url, --compare and --show")
    _need_httpx()
    from embferry.bench.serving import markdown as markdown_of
    from embferry.bench.serving import report, terminal
    from embferry.bench.serving import results as files

    if show is not None:
        results = _earlier(show, verify)
    elif compare:
        results = _compared(_comparison(only, quick, rounds, spin, python, verify, logs))
    else:
        assert url is not None
        results = _alone(url.rstrip("/"), locals())
    if show is None:
        out.mkdir(parents=True, exist_ok=True)
        files.save(results, out / "serve.json")
    terminal.show(results)
    typer.echo(f"{show or out / 'serve.json'} has every sample", err=True)
    if markdown is not None:
        try:
            markdown_of.write(results, markdown)
        except ValueError as error:
            fail(str(error))
    problems = report.problems(results)
    for problem in problems:
        typer.echo(f"failed: {problem}", err=True)
    if not results.complete and show is None:
        raise typer.Exit(INTERRUPTED)
    if problems:
        raise typer.Exit(SOME_FAILED)


def _need_httpx() -> None:
    try:
        import httpx  # noqa: F401  (is it there?)
    except ModuleNotFoundError:
        fail("httpx is not installed; install it with: pip install 'embferry[serve]'")


def _earlier(path: Path, verify: str) -> Results:
    from embferry.bench.serving import alone, results

    try:
        shown = results.load(path)
        if verify:
            alone.verify(shown, results.load(Path(verify)))
    except (OSError, ValueError) as error:
        fail(str(error))
    return shown


def _alone(url: str, options: dict[str, Any]) -> Results:
    """Ends the process with status 2 when something is wrong with what was asked for."""
    from embferry.bench.serving import alone, terminal
    from embferry.bench.serving.driver import Endpoint, first_model
    from embferry.bench.serving.workload import Plan

    asked = {name: options[name] for name in Plan.__struct_fields__}
    plan = Plan(**asked | {"rate": None if math.isinf(asked["rate"]) else asked["rate"]})
    try:
        plan.check()
        if not alone.is_url(url):
            raise ValueError(f"--url {url}: it begins with http:// or https://")
        extra = json.loads(options["extra"])
        if not isinstance(extra, dict):
            raise ValueError("--extra is an object of JSON")
        key = options["api_key"]
        endpoint = Endpoint(
            url=url,
            model=options["model"] or first_model(url, key),
            max_tokens=options["max_tokens"],
            timeout_s=options["timeout"],
            concurrency=options["concurrency"],
            extra=extra,
            api_key=key,
        )
        choice = alone.Choice(plan, endpoint, options["verify"], tuple(options["metrics"] or ()), _said())
        with terminal.progress(alone.work(choice)) as report:
            return alone.measure(choice, report)
    except ValueError as error:
        fail(str(error))


def _comparison(
    only: list[str] | None, quick: bool, rounds: int, spin: bool, python: str, verify: str, logs: Path | None
) -> Comparison:
    """Ends the process with status 2 when a name is wrong, or there is no vLLM."""
    from embferry.bench.serving import results
    from embferry.bench.serving.compare import Choice, chosen

    if python == sys.executable and importlib.util.find_spec("vllm") is None:
        fail("vLLM is not installed here; run this in its environment, or name its Python: --python")
    try:
        configurations, scenarios = chosen(only or [])
        known = tuple(results.load(Path(verify)).references) if verify else ()
    except (OSError, ValueError) as error:
        fail(str(error))
    kept = None if logs is None else logs.absolute()
    return Choice(python, configurations, scenarios, quick, rounds, spin, _said(), known, kept)


def _compared(choice: Comparison) -> Results:
    from embferry.bench.serving import compare, terminal
    from embferry.bench.serving.server import StartError

    try:
        results = compare.blank(choice)
    except ValueError as error:
        fail(str(error))
    began = time.monotonic()
    # Asked to end from outside, it ends as with Ctrl-C: in order.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with terminal.progress(compare.work(choice)) as report, suppress(KeyboardInterrupt):
            compare.compare(choice, results, report)
            results.complete = True
    except StartError as error:
        fail(f"the undivided engine does not start: {error}", status=SOME_FAILED)
    finally:
        signal.signal(signal.SIGTERM, before)
        results.took_s = round(time.monotonic() - began, 1)
    return results


def _said() -> str:
    return shlex.join(["embferry", *sys.argv[1:]])
