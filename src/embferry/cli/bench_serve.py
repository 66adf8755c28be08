"""``embferry bench serve``: a workload of pictures for any chat endpoint, and an engine's ways to split compared."""

from __future__ import annotations

import json
import math
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embferry.cli.bench_results import SOME_FAILED, conclude, failures, need
from embferry.cli.options import fail, not_on_command_line

if TYPE_CHECKING:
    from embferry.bench.serving.results import ServingResults


def _option(panel: str, help: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **more)


class EngineName(StrEnum):
    VLLM = "vllm"
    SGLANG = "sglang"


E, W, C, R = "Endpoint", "Workload", "Comparison", "Results"


def command(
    url: Annotated[str | None, _option(E, "The endpoint, without /v1.", "URL")] = None,
    model: Annotated[str | None, _option(E, "By default the first that the endpoint lists.", "NAME")] = None,
    api_key: Annotated[str, _option(E, "", hidden=True, envvar="OPENAI_API_KEY", callback=not_on_command_line)] = "",
    extra: Annotated[str, _option(E, "More of each request's body: '{\"ignore_eos\": true}'.", "JSON")] = "{}",
    timeout: Annotated[float, _option(E, "For one request.", "SECONDS", min=0.1)] = 120.0,
    metrics: Annotated[list[str] | None, _option(E, "Prometheus metrics of a server; may be repeated.", "URL")] = None,
    verify: Annotated[
        str, _option(E, "An undivided endpoint, or earlier results: a different answer is a failure.", "URL|FILE")
    ] = "",
    requests: Annotated[int, _option(W, "Number of requests.", "N", min=1)] = 100,
    rate: Annotated[float, _option(W, "Requests a second, on average; inf sends all at once.", "N")] = 1.0,
    burstiness_cv: Annotated[
        float, _option(W, "Coefficient of variation of the gaps: 1 is Poisson, 4.9 bursty.", "N", min=0)
    ] = 1.0,
    concurrency: Annotated[int, _option(W, "Requests under way at once; 0 for any number.", "N", min=0)] = 0,
    repeated: Annotated[float, _option(W, "Share of pictures that were sent before.", "SHARE", min=0, max=0.8)] = 0.0,
    max_images: Annotated[int, _option(W, "Most pictures a request.", "N", min=1)] = 9,
    max_image_tokens: Annotated[int, _option(W, "Most visual tokens a picture.", "TOKENS", min=4)] = 1280,
    side: Annotated[
        int, _option(W, "Pixels a side of a visual token: 28 for Qwen2.5-VL, 32 for Qwen3-VL.", "PIXELS", min=1)
    ] = 28,
    max_tokens: Annotated[int, _option(W, "Tokens an answer.", "TOKENS", min=1)] = 32,
    seed: Annotated[int, _option(W, "Of everything that is drawn.", "N", min=0)] = 0,
    compare: Annotated[
        bool, _option(C, "Start an engine, undivided and divided in each way, and compare.", None, "--compare")
    ] = False,
    engine: Annotated[EngineName, _option(C, "The engine that is compared.", "vllm|sglang")] = EngineName.VLLM,
    only: Annotated[
        list[str] | None,
        _option(C, "Configurations or scenarios, such as ours-tcp, ours*, killed; may be repeated.", "NAME"),
    ] = None,
    rounds: Annotated[int, _option(C, "How often everything is done, in turns.", "N", min=1)] = 1,
    side_by_side: Annotated[
        bool, _option(C, "Start all at once, ask each in turn, and show ratios of medians.", None, "--side-by-side")
    ] = False,
    spin: Annotated[
        bool, _option(C, "Let vLLM's processes poll for messages, which fills a machine of few cores.", None, "--spin")
    ] = False,
    quick: Annotated[bool, _option(C, "A few requests of each.", None, "--quick")] = False,
    add_to: Annotated[
        Path | None, _option(C, "Keep the runs of an earlier serve.json that are not measured again.", "FILE")
    ] = None,
    python: Annotated[
        str, _option(C, "The Python that has the engine; this one by default.", "FILE", show_default=False)
    ] = sys.executable,
    logs: Annotated[Path | None, _option(C, "Keep the servers' logs there.", "DIR")] = None,
    out: Annotated[Path, _option(R, "Folder for serve.json and serve.html.", "DIR")] = Path("bench-results"),
    markdown: Annotated[Path | None, _option(R, "Also write the tables as Markdown.", "FILE")] = None,
    show: Annotated[Path | None, _option(R, "Measure nothing: show an earlier serve.json.", "FILE")] = None,
) -> None:
    """Send pictures to a chat endpoint, as in practice.

    With --compare: compare an engine's ways to split.
    """
    if [url is not None, compare, show is not None].count(True) != 1:
        fail("give one of --url, --compare and --show")
    if compare and verify:
        fail("--compare compares answers by itself; --verify goes with --url and --show")
    need("httpx", "jinja2", "PIL", extra="serve")
    from embferry.bench.results import load
    from embferry.bench.serving import endpoint
    from embferry.bench.serving.report import report
    from embferry.bench.serving.results import ServingResults

    options, saved = locals(), show or out / "serve.json"
    with failures():
        if show is not None:
            results = load(show, ServingResults)
            if verify:
                endpoint.verify_earlier(results, load(Path(verify), ServingResults))
        else:
            results = (_compare if compare else _endpoint)(options, saved)
        conclude(results, report(results), saved, saved.with_suffix(".html"), markdown, shown=show is not None)


def _endpoint(options: dict[str, Any], saved: Path) -> ServingResults:
    """Measures one endpoint.

    Raises:
        ValueError: an option is wrong.
    """
    from embferry.bench import machine
    from embferry.bench.serving.client import Endpoint
    from embferry.bench.serving.endpoint import first_model, is_url, measure_endpoint
    from embferry.bench.serving.results import ServingResults
    from embferry.bench.serving.workload import Plan
    from embferry.bench.show import progress

    given = {name: options[name] for name in Plan.__struct_fields__}
    plan = Plan(**given | {"rate": None if math.isinf(given["rate"]) else given["rate"]})
    plan.check()
    url, extra, verify = options["url"].rstrip("/"), json.loads(options["extra"]), options["verify"]
    if not is_url(url):
        raise ValueError(f"--url {url}: it has to begin with http:// or https://")
    if not isinstance(extra, dict):
        raise ValueError("--extra has to be a JSON object")
    limits = (options["max_tokens"], options["timeout"], options["concurrency"])
    endpoint = Endpoint(url, options["model"] or "", *limits, extra, options["api_key"])
    if not endpoint.model:
        endpoint = Endpoint(url, first_model(endpoint), *limits, extra, options["api_key"])
    results = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES))
    # The answers are asked for again if they are compared with those of another endpoint.
    with progress(plan.requests * (2 if is_url(verify) else 1), "requests") as told, results.recording(saved):
        measure_endpoint(plan, endpoint, verify, options["metrics"] or (), results, told)
    return results


def _compare(options: dict[str, Any], saved: Path) -> ServingResults:
    """Compares an engine's ways to split.

    Raises:
        ValueError: a name is wrong, or the engine is not there.
    """
    from embferry.bench import machine
    from embferry.bench.results import load
    from embferry.bench.serving.compare import Comparison
    from embferry.bench.serving.engines import ENGINES
    from embferry.bench.serving.results import ServingResults
    from embferry.bench.serving.stack import StartError
    from embferry.bench.show import progress

    engine, python, logs = ENGINES[options["engine"]], options["python"], options["logs"]
    if python == sys.executable and find_spec(engine.name) is None:
        raise ValueError(
            f"{engine.title} is not installed here; run this in its environment, or name its Python: --python"
        )
    chosen = {name: options[name] for name in ("quick", "rounds", "side_by_side", "spin")}
    comparison = Comparison(python, options["only"] or (), **chosen, logs=logs and logs.absolute(), engine=engine)
    results = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES, python), quick=options["quick"])
    results.compared, results.engine = True, engine.title
    if options["add_to"] is not None:
        comparison.keep(load(options["add_to"], ServingResults), results)
    try:
        with progress(comparison.total_requests, "requests") as told, results.recording(saved):
            comparison.run(results, told)
    except StartError as error:
        fail(f"the undivided engine does not start: {error}", status=SOME_FAILED)
    return results
