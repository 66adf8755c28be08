"""``embferry status``: one look at routers and their workers, with an exit status for scripts."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from embferry.cli.activity.report import as_json, as_lines
from embferry.cli.activity.routers import ApiKey, Ca, Router, Urls, routers
from embferry.cli.activity.state import Activity
from embferry.cli.activity.summary import Expected, Health, Summary, no_answer, summary_of, worst
from embferry.cli.ask import DEFAULT_URL
from embferry.cli.wrapping import width_of
from embferry.observe.logs import is_colourful

STATUSES: dict[Health, int] = {"ready": 0, "degraded": 1, "not_ready": 3, "no_answer": 3}
"""Exit status. 2 is that of wrong arguments, as everywhere."""


def command(
    url: Urls = [DEFAULT_URL],  # noqa: B006  (typer's way to say so; nothing changes it)
    ca: Ca = "",
    api_key: ApiKey = "",
    minutes: Annotated[int, typer.Option(min=1, max=10, help="Time that counts as recent.", metavar="MINUTES")] = 5,
    encoders: Annotated[int, typer.Option(min=0, help="Encoders that must be up.", metavar="INSTANCES")] = 0,
    languages: Annotated[int, typer.Option(min=0, help="Language instances that must be up.", metavar="INSTANCES")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest wait for a router.", metavar="SECONDS")] = 10.0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show whether routers and workers are well, and what they do.

    The exit status is that of the worst router. 0: all is well. 1: it is ready, but a worker is missing or unfit.
    3: it is not ready, or does not answer. The routers' API key is read from EMBFERRY_ROUTER_API_KEY.
    """
    import asyncio

    expected, seconds = Expected(encoders, languages), 60.0 * minutes
    asked = routers(url, ca, api_key)
    found = asyncio.run(_all(asked, seconds, expected, timeout))
    health = worst([summary.health for _, summary in found])
    if json_:
        told = [as_json(router.shown_url, summary, seconds) for router, summary in found]
        typer.echo(json.dumps({"state": health, "routers": told}))
    else:
        colour = sys.stdout.isatty() and is_colourful(sys.stdout.fileno())
        for router, summary in found:
            for line in as_lines(router.shown_url, summary, seconds, width_of(sys.stdout), colour=colour):
                typer.echo(line)
    raise typer.Exit(STATUSES[health])


async def _all(asked: list[Router], seconds: float, expected: Expected, timeout: float) -> list[tuple[Router, Summary]]:
    """Asks all routers at once."""
    import asyncio

    summaries = await asyncio.gather(*(summary_by_asking(router, seconds, expected, timeout) for router in asked))
    return list(zip(asked, summaries, strict=True))


async def summary_by_asking(
    router: Router, seconds: float, expected: Expected | None = None, timeout: float = 10.0
) -> Summary:
    """Returns the summary of a router as it is now."""
    import asyncio

    from embferry.cli.activity.feed import NoAnswerError, look

    try:
        async with asyncio.timeout(timeout):
            told = await look(router)
    except NoAnswerError as error:
        return no_answer(str(error))
    except TimeoutError:
        return no_answer(f"the server at {router.shown_url} does not answer within {timeout:g} s; is it a router?")
    activity = Activity(told, time.monotonic())
    return summary_of(activity, told.now, seconds, expected)
