"""``embferry bench serve``: a workload of pictures for any chat endpoint, and vLLM's ways to split compared."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embferry.cli.options import fail

if TYPE_CHECKING:
    from embferry.bench.serving.results import ServingResults

SOME_FAILED, INTERRUPTED = 1, 130
NEEDED = ("httpx", "jinja2", "PIL")


def _option(panel: str, help: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **more)


E, W, C, R = "Endpoint", "Workload", "Comparison", "Results"


def command(
    url: Annotated[str | None, _option(E, "The endpoint, without /v1.", "URL")] = None,
    model: Annotated[str | None, _option(E, "By default the first that the endpoint lists.", "NAME")] = None,
    api_key: Annotated[str, _option(E, "The endpoint's key.", envvar="OPENAI_API_KEY")] = "",
    extra: Annotated[str, _option(E, "More of each request's body: '{\"ignore_eos\": true}'.", "JSON")] = "{}",
    timeout: Annotated[float, _option(E, "For one request.", "SECONDS", min=0.1)] = 120.0,
    metrics: Annotated[list[str] | None, _option(E, "Prometheus metrics of a server; may be repeated.", "URL")] = None,
    verify: Annotated[
        str, _option(E, "An undivided endpoint, or earlier results: a different answer is a failure.", "URL|FILE")
    ] = "",
    requests: Annotated[int, _option(W, "Number of requests.", min=1)] = 100,
    rate: Annotated[float, _option(W, "Requests a second, on average; inf sends all at once.")] = 1.0,
    burstiness_cv: Annotated[
        float, _option(W, "Coefficient of variation of the gaps: 1 is Poisson, 4.9 bursty.", min=0)
    ] = 1.0,
    concurrency: Annotated[int, _option(W, "Requests under way at once; 0 for any number.", min=0)] = 0,
    repeated: Annotated[float, _option(W, "Share of pictures that were sent before.", min=0, max=0.8)] = 0.0,
    max_images: Annotated[int, _option(W, "Most pictures a request.", min=1)] = 9,
    max_image_tokens: Annotated[int, _option(W, "Most visual tokens a picture.", min=4)] = 1280,
    side: Annotated[
        int, _option(W, "Pixels a side of a visual token: 28 for Qwen2.5-VL, 32 for Qwen3-VL.", min=1)
    ] = 28,
    max_tokens: Annotated[int, _option(W, "Tokens an answer.", min=1)] = 32,
    seed: Annotated[int, _option(W, "Of everything that is drawn.", min=0)] = 0,
    compare: Annotated[
        bool, _option(C, "Start vLLM, undivided and divided in each way, and compare.", None, "--compare")
    ] = False,
    only: Annotated[
        list[str] | None,
        _option(C, "Configurations or scenarios, such as ours-tcp, ours*, killed; may be repeated.", "NAME"),
    ] = None,
    rounds: Annotated[int, _option(C, "How often everything is done, in turns.", min=1)] = 1,
    spin: Annotated[
        bool, _option(C, "Let vLLM's processes poll for messages, which fills a machine of few cores.", None, "--spin")
    ] = False,
    quick: Annotated[bool, _option(C, "A few requests of each.", None, "--quick")] = False,
    python: Annotated[
        str, _option(C, "The Python that has vLLM; this one by default.", "FILE", show_default=False)
    ] = sys.executable,
    logs: Annotated[Path | None, _option(C, "Keep the servers' logs there.", "DIR")] = None,
    out: Annotated[Path, _option(R, "Folder for serve.json and serve.html.", "DIR")] = Path("bench-results"),
    markdown: Annotated[Path | None, _option(R, "Also write the tables as Markdown.", "FILE")] = None,
    show: Annotated[Path | None, _option(R, "Measure nothing: show an earlier serve.json.", "FILE")] = None,
) -> None:
    """Send pictures to a chat endpoint as they come in practice, or compare vLLM's ways to split."""
    if [url is not None, compare, show is not None].count(True) != 1:
        fail("give one of --url, --compare and --show")
    if compare and verify:
        fail("--compare compares answers by itself; --verify goes with --url and --show")
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            fail(f"{module} is not installed; install it with: pip install 'embferry[serve]'")
    from embferry.bench import output
    from embferry.bench.serving.report import report as report_of
    from embferry.bench.serving.server import StartError

    options, saved = locals(), show or out / "serve.json"
    try:
        results = _earlier(options) if show else _compare(options, saved) if compare else _endpoint(options, saved)
        report = report_of(results)
        output.present(report, saved.with_suffix(".html"), markdown)
    except StartError as error:
        fail(f"the undivided engine does not start: {error}", status=SOME_FAILED)
    except (OSError, ValueError) as error:
        fail(str(error))
    typer.echo(f"{saved} has every sample", err=True)
    for problem in report.problems:
        typer.echo(f"failed: {problem}", err=True)
    if not results.complete and show is None:
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise typer.Exit(SOME_FAILED)


def _earlier(options: dict[str, Any]) -> ServingResults:
    from embferry.bench.results import load
    from embferry.bench.serving import endpoint
    from embferry.bench.serving.results import ServingResults

    shown = load(options["show"], ServingResults)
    if options["verify"]:
        endpoint.verify(shown, load(Path(options["verify"]), ServingResults))
    return shown


def _endpoint(options: dict[str, Any], saved: Path) -> ServingResults:
    """Measures one endpoint.

    Raises:
        ValueError: an option is wrong.
    """
    from embferry.bench import machine, output, terminal
    from embferry.bench.serving.client import Endpoint, first_model
    from embferry.bench.serving.endpoint import Choice, is_url, measure, total_requests
    from embferry.bench.serving.results import ServingResults
    from embferry.bench.serving.workload import Plan

    given = {name: options[name] for name in Plan.__struct_fields__}
    plan = Plan(**given | {"rate": None if math.isinf(given["rate"]) else given["rate"]})
    plan.check()
    url, key = options["url"].rstrip("/"), options["api_key"]
    if not is_url(url):
        raise ValueError(f"--url {url}: it has to begin with http:// or https://")
    extra = json.loads(options["extra"])
    if not isinstance(extra, dict):
        raise ValueError("--extra has to be a JSON object")
    endpoint = Endpoint(
        url=url,
        model=options["model"] or first_model(url, key),
        max_tokens=options["max_tokens"],
        timeout_s=options["timeout"],
        concurrency=options["concurrency"],
        extra=extra,
        api_key=key,
    )
    choice = Choice(plan, endpoint, options["verify"], tuple(options["metrics"] or ()))
    results = ServingResults.begin(_said(), machine.describe(machine.SERVING_PACKAGES))

    def work() -> None:
        with results.recording():
            measure(choice, results, progress)

    with terminal.progress(total_requests(choice), "requests") as progress:
        output.measured(results, saved, work)
    return results


def _compare(options: dict[str, Any], saved: Path) -> ServingResults:
    """Compares vLLM's ways to split.

    Raises:
        StartError: the undivided engine does not start.
        ValueError: a name is wrong, or there is no vLLM.
    """
    from embferry.bench import machine, output, terminal
    from embferry.bench.serving.compare import Choice, chosen, compare, setting, total_requests
    from embferry.bench.serving.results import ServingResults

    python, logs = options["python"], options["logs"]
    if python == sys.executable and importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; run this in its environment, or name its Python: --python")
    configurations, scenarios = chosen(options["only"] or [])
    choice = Choice(
        python=python,
        configurations=configurations,
        scenarios=scenarios,
        quick=options["quick"],
        rounds=options["rounds"],
        spin=options["spin"],
        logs=None if logs is None else logs.absolute(),
    )
    packages = machine.SERVING_PACKAGES
    results = ServingResults.begin(_said(), machine.describe(packages, python), quick=choice.quick)
    results.compared, results.setting = True, setting(choice)

    def work() -> None:
        with results.recording():
            compare(choice, results, progress)

    with terminal.progress(total_requests(choice), "requests") as progress:
        output.measured(results, saved, work)
    return results


def _said() -> str:
    return shlex.join(["embferry", *sys.argv[1:]])
