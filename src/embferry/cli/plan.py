"""``embferry plan``: how many encoders and language instances, and whether to split at all."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embferry.cli.bench_results import need
from embferry.cli.options import BAD_USAGE, fail, not_on_command_line
from embferry.cli.wrapping import folded, width_of
from embferry.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from embferry.plan.model import Model
    from embferry.plan.pool import Pool
    from embferry.plan.speeds import Speeds
    from embferry.plan.text import Pictures

_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_LOOPBACK = re.compile(r"https?://(localhost|127(\.\d+){3}|\[::1\])(:\d+)?(/.*)?")
OUTSIDE = 1
"""Exit status of ``--check`` if a prediction is off by more than a fifth, of a rate that the devices do not carry, of
a goal that cannot be met, and of a deployment that does not answer."""


def command(
    model: Annotated[
        str, typer.Option(help="A model as for embferry serve, or a config.json.", metavar="MODEL")
    ] = DEFAULT_MODEL,
    images: Annotated[int, typer.Option(min=0, max=1000, help="Pictures a request.", metavar="N")] = 1,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Pixels of a picture; several are taken in turn, over all requests. [default: 1024x768]", metavar="WxH"
        ),
    ] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens of a picture, instead of its size.", metavar="TOKENS")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, on average.", metavar="N")] = 1.0,
    burstiness_cv: Annotated[
        float, typer.Option(help="Coefficient of variation of the gaps: 1 is Poisson, 4.9 bursty.", metavar="N")
    ] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of text a request.", metavar="TOKENS")] = 100,
    output_tokens: Annotated[int, typer.Option(help="Tokens an answer.", metavar="TOKENS")] = 64,
    requests: Annotated[int, typer.Option(help="Requests to play through.", metavar="N")] = 500,
    seed: Annotated[int, typer.Option(help="Of the times that are drawn.", metavar="N")] = 0,
    speeds: Annotated[
        Path | None, typer.Option(help="Speeds that --save has written.", metavar="FILE", show_default=False)
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="Measure speeds at an undivided engine, or a router.", metavar="URL")
    ] = None,
    measure_split: Annotated[
        str | None, typer.Option(help="Measure also what splitting adds, at a router.", metavar="URL")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the speeds.", metavar="FILE")] = None,
    repeats: Annotated[
        int, typer.Option(min=3, max=1000, help="How often each request is measured; the median counts.", metavar="N")
    ] = 5,
    served_model: Annotated[
        str, typer.Option(help="The model's name at --measure; by default the first listed.", metavar="NAME")
    ] = "",
    extra: Annotated[
        str, typer.Option(help="More of each measured request's body: '{\"ignore_eos\": true}'.", metavar="JSON")
    ] = "{}",
    api_key: Annotated[str, typer.Option(hidden=True, envvar="OPENAI_API_KEY", callback=not_on_command_line)] = "",
    encode_seconds_per_token: Annotated[
        float | None, typer.Option(help="Seconds of the vision encoder.", metavar="SECONDS")
    ] = None,
    prefill_seconds_per_token: Annotated[
        float | None, typer.Option(help="Seconds of the language model, of a prompt.", metavar="SECONDS")
    ] = None,
    step_seconds: Annotated[
        float | None, typer.Option(help="Seconds of the language model, of a token of an answer.", metavar="SECONDS")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bytes a second of each language instance's link.", metavar="BYTES")
    ] = None,
    cores: Annotated[
        float | None,
        typer.Option(
            help="Cores that all instances share; 0 if each has a device of its own. [default: 0, at --measure on this "
            "machine its cores]",
            metavar="N",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=2, max=64, help="Instances to arrange; by default as few as carry the rate.", metavar="N"),
    ] = None,
    ttft_goal: Annotated[
        float | None,
        typer.Option(
            help="Find the fewest instances whose median time to first token is no longer; --devices are the most.",
            metavar="SECONDS",
        ),
    ] = None,
    pool_blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks of a receive pool; by default enough.", metavar="N")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.", metavar="TOKENS")] = 128,
    check: Annotated[
        Path | None, typer.Option(help="Compare with a serve.json of embferry bench serve.", metavar="FILE")
    ] = None,
    encoders: Annotated[
        int, typer.Option(min=0, help="With --check: encoders measured; 0 if undivided.", metavar="N")
    ] = 0,
    languages: Annotated[int, typer.Option(min=1, help="With --check: language instances measured.", metavar="N")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the time to first token by rate.", metavar="FILE.svg")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan encoders and language instances: how many of each.

    Speeds come from --speeds, from a running deployment (--measure), or from the options that end with seconds. With
    --check the exit status is 1 if a prediction is off by more than a fifth; without it, if the devices do not carry
    the rate, or no number of them meets the goal.
    """
    need("httpx", extra="router")
    from embferry.plan import advice as advices
    from embferry.plan import files, goal, text
    from embferry.plan.errors import (
        GoalNotMet,
        MeasuringFailed,
        PlanError,
        RateNotCarried,
        SpeedsInvalid,
        WorkloadInvalid,
    )
    from embferry.plan.pool import Pool
    from embferry.plan.speeds import encoded
    from embferry.plan.workload import Workload

    options = locals()
    try:
        if plot is not None and plot.suffix.lower() != ".svg":
            raise WorkloadInvalid(f"--plot {plot}: plots are drawn as SVG; give a name that ends with .svg")
        known = files.read_model(model)
        found = _speeds(options, known)
        if found.noisy and (json_ or check is not None):  # else the report has it
            typer.echo(found.noisy, err=True)
        if save is not None:
            try:
                save.write_bytes(encoded(found))
            except OSError as error:
                raise SpeedsInvalid(f"{save} cannot be written: {error.strerror or error}") from error
        pool = Pool(pool_blocks, block_size) if pool_blocks is not None else None
        if check is not None:
            _check(check, encoders, languages, found, known, pool, as_json=json_)
            return
        pictures = _pictures(known, images, size or [], image_tokens)
        workload = Workload(
            pictures=tuple(tokens for _, tokens in pictures.sizes),
            images=images,
            rate=rate,
            burstiness_cv=burstiness_cv,
            text_tokens=prompt_tokens,
            output_tokens=output_tokens,
            requests=requests,
            seed=seed,
        )
        asked = workload.asked()
        advised = advices.advise if ttft_goal is None else partial(goal.advise_for, ttft_goal)
        advice = advised(asked, rate, found, known.token_bytes, block_size=block_size, devices=devices, pool=pool)
        if plot is not None:
            _draw(plot, advice, workload, found, known, pool)
    except PlanError as error:
        is_usage = not isinstance(error, MeasuringFailed | RateNotCarried | GoalNotMet)
        fail(f"{error.code}: {error.detail}", status=BAD_USAGE if is_usage else OUTSIDE)
    if json_:
        typer.echo(json.dumps(text.as_object(known, advice, found, pictures), indent=1))
    else:
        report, width = text.report(known, advice, found, pictures), width_of(sys.stdout)
        parts = (
            [folded(line, width) for line in report.head],
            report.table,
            [folded(line, width) for line in report.tail],
        )
        typer.echo("\n\n".join("\n".join(lines) for lines in parts))


def _pictures(known: Model, images: int, sizes: Sequence[str], tokens: int | None) -> Pictures:
    """Returns the pictures of the requests.

    Raises:
        WorkloadInvalid: a size is none.
        ModelUnknown: the model does not say how many tokens a picture has.
    """
    from embferry.plan.errors import WorkloadInvalid
    from embferry.plan.text import Pictures

    if not images:
        raise WorkloadInvalid("--images 0: without pictures there is nothing to encode, so nothing to split")
    if tokens is not None:
        if sizes:
            raise WorkloadInvalid("--size and --image-tokens say the same in two ways; give one of them")
        return Pictures(images, ((None, tokens),))
    each = []
    for size in sizes or ["1024x768"]:
        if (sides := _SIZE.fullmatch(size)) is None:
            raise WorkloadInvalid(f"--size {size}: give width and height in pixels, such as 1024x768")
        each.append((size, known.tokens(int(sides[1]), int(sides[2]))))
    return Pictures(images, tuple(each))


def _speeds(options: dict[str, Any], known: Model) -> Speeds:
    """Returns the speeds from the file, the deployment, or the options; options go before the rest.

    Raises:
        PlanError: they are missing or wrong.
    """
    import msgspec

    from embferry.plan import files
    from embferry.plan.curve import Curve
    from embferry.plan.errors import SpeedsInvalid, SpeedsMissing
    from embferry.plan.speeds import Speeds

    given: dict[str, Any] = {
        name: Curve(each=options[f"{name}_seconds_per_token"])
        for name in ("encode", "prefill")
        if options[f"{name}_seconds_per_token"] is not None
    }
    if options["step_seconds"] is not None:
        given["step"] = Curve(base=options["step_seconds"])
    changed: dict[str, Any] = dict(given)
    if "step" in given:
        changed["split_step"] = None  # measured for the other one
    if options["bandwidth"] is not None:
        changed["bandwidth"] = options["bandwidth"]
    if options["cores"] is not None:
        if not options["cores"] >= 0:
            raise SpeedsInvalid(
                f"--cores {options['cores']:g}: give a number above 0, or 0 if each instance has a device of its own"
            )
        changed["cores"] = options["cores"] or None
    measured = [url for url in (options["measure"], options["measure_split"]) if url]
    if options["speeds"] is not None and measured:
        raise SpeedsInvalid("--speeds and --measure say the same in two ways; give one of them")
    if options["speeds"] is not None:
        found = files.read_speeds(options["speeds"])
    elif measured:
        found = _measured(options, known, measured, changed.get("cores"))
    elif len(given) == 3:
        found = Speeds(**given)
    else:
        raise SpeedsMissing(
            "nothing says how fast the stages are: give --speeds FILE, or measure a deployment with --measure URL, or "
            "give --encode-seconds-per-token, --prefill-seconds-per-token and --step-seconds"
        )
    if given and (options["speeds"] is not None or measured):
        changed["source"] = f"{found.source}; {', '.join(given)} as given"
    found = msgspec.structs.replace(found, **changed)
    found.check()
    return found


def _measured(options: dict[str, Any], known: Model, urls: Sequence[str], cores: float | None) -> Speeds:
    """Measures the speeds at one deployment or two.

    Raises:
        PlanError: an option is wrong, or a deployment does not answer.
    """
    from datetime import UTC, datetime
    from urllib.parse import urlsplit

    from embferry.plan import probes
    from embferry.plan.errors import MeasuringFailed
    from embferry.plan.measuring import Target

    need("PIL", extra="serve")
    try:
        extra = json.loads(options["extra"])
    except ValueError as error:
        raise MeasuringFailed(f"--extra is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise MeasuringFailed("--extra has to be a JSON object")
    if options["cores"] is None and all(_LOOPBACK.fullmatch(url) for url in urls):
        cores = len(os.sched_getaffinity(0))
    times: dict[bool, probes.Times] = {}
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise MeasuringFailed(f"{url}: it has to begin with http:// or https://")
        try:
            urlsplit(url).port  # noqa: B018 - a number that is no port is an error
        except ValueError as error:
            raise MeasuringFailed(f"{url}: {error}") from error
        target = Target(url, known, options["served_model"], extra, options["api_key"], _tell, options["repeats"])
        is_split = target.deployment.is_split
        if url == options["measure_split"] and not is_split:
            raise MeasuringFailed(f"{url} is no router of embferry; give an undivided engine with --measure")
        if is_split in times:
            raise MeasuringFailed(f"{url} is a router, as the other URL; measure an undivided engine beside it")
        times[is_split] = target.times()
    what = {False: "an undivided engine", True: "a split deployment"}
    date = datetime.now(UTC).date().isoformat()
    source = f"measured at {' and '.join(what[kind] for kind in sorted(times))} on {date}"
    return probes.speeds(times.get(False), times.get(True), cores=cores, source=source)


def _tell(what: str) -> None:
    typer.echo(f"measuring: {what}", err=True)


def _check(
    path: Path, encoders: int, languages: int, found: Speeds, known: Model, pool: Pool | None, *, as_json: bool
) -> None:
    """Prints predictions beside measured figures, and ends the process.

    Raises:
        ResultsInvalid: there is nothing to compare with.
    """
    import msgspec

    from embferry.bench.results import load
    from embferry.bench.serving.results import ServingResults
    from embferry.plan import comparison, text
    from embferry.plan.deployment import Deployment
    from embferry.plan.errors import ResultsInvalid

    try:
        results = load(path, ServingResults)
    except (OSError, ValueError) as error:
        raise ResultsInvalid(str(error)) from error
    points, refused = [], list[ResultsInvalid]()
    for runs in comparison.by_workload(results.runs):
        measured = comparison.deployment_of(runs[0], results, Deployment(encoders, languages))
        try:
            points.append(comparison.compared(runs, measured, found, known.token_bytes, pool))
        except ResultsInvalid as error:
            refused.append(error)
    if not points:
        raise refused[-1] if refused else ResultsInvalid(f"{path} has no run with samples")
    for one in refused:
        typer.echo(f"left out: {one.detail}", err=True)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(points), indent=1))
    else:
        for line in text.table(comparison.table(points)):
            typer.echo(line)
    raise typer.Exit(0 if all(point.holds for point in points) else OUTSIDE)


def _draw(path: Path, advice: Any, workload: Any, found: Speeds, known: Model, pool: Pool | None) -> None:
    """Writes the plot.

    Raises:
        WorkloadInvalid: the file cannot be written.
    """
    import msgspec

    from embferry.plan import plot
    from embferry.plan.effort import effort
    from embferry.plan.errors import WorkloadInvalid
    from embferry.plan.simulation import play

    most = max(advice.undivided.capacity, advice.split.capacity)

    def line(row: Any) -> plot.Line:
        def at(rate: float) -> Any:
            asked = msgspec.structs.replace(workload, rate=rate).asked()
            part = effort(asked, [row.deployment] * plot.RATES, found)
            return play(asked[: part.requests], row.deployment, found, known.token_bytes, pool, draws=part.draws)

        return plot.line(row, most, at)

    drawn = plot.svg([line(advice.undivided), line(advice.split)], workload.rate)
    try:
        path.write_text(drawn)
    except OSError as error:
        raise WorkloadInvalid(f"--plot {path}: it cannot be written: {error.strerror or error}") from error
