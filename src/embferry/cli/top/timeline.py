"""One request in time: its phases, workers, transfer and outcome. Pure."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from embferry.cli.activity.words import BAD, PLAIN, described, media_of, spent, transferred
from embferry.cli.top.bars import bar
from embferry.cli.top.board import Row
from embferry.cli.top.colours import KINDS, SOFT, STRONG, phase_colour
from embferry.cli.top.lines import cell, clock, line
from embferry.cli.wrapping import folded

_NAME, _TIME, _LABEL = 10, 9, 13


def timeline_lines(row: Row, width: int) -> list[Text]:
    """Returns the lines of a request.

    Args:
        row: the request.
        width: columns.
    """
    request = row.request
    length = max(0.001, row.seconds)
    made = []
    for phase in request.phases:
        end = row.now if phase.end is None else phase.end
        made.append(
            line(
                [
                    cell(phase.name, _NAME, Style(color=phase_colour(phase.name), bold=True)),
                    cell(f"+{spent(phase.begin - request.began)}", _TIME, SOFT, right=True),
                    cell(spent(end - phase.begin), _TIME, STRONG, right=True),
                    Text("  "),
                    bar(request, [phase], row.now, length, max(1, width - _NAME - 2 * _TIME - 2)),
                ],
                width,
            )
        )
    made.append(Text(""))
    for label, text, style in _facts(row):
        first, *rest = folded(text, max(1, width - _LABEL)).split("\n")
        made.append(line([cell(label, _LABEL, SOFT), (first, style)], width))
        made += [line([(" " * _LABEL, SOFT), (more, style)], width) for more in rest]
    return made


def _facts(row: Row) -> list[tuple[str, str, Style]]:
    request, activity = row.request, row.router.activity
    began = clock(row.router.epoch + request.began)
    asked = f"{request.path}, {media_of(request)}, {'streamed' if request.streams else 'not streamed'}, at {began}"

    def known(id: str) -> str:
        return id if activity is None else described(activity, id)

    failed = request.outcome not in ("", "answered", "client left")
    facts = [
        ("router", row.router.url if row.router.label else "", PLAIN),
        ("asked", asked, PLAIN),
        ("encoder", ", ".join(map(known, request.encoders)), PLAIN),
        ("language", request.language and known(request.language), PLAIN),
        ("transfer", "" if request.transfer is None else transferred(request.transfer), PLAIN),
        ("attempts", str(request.attempts) if request.attempts > 1 else "", PLAIN),
        ("first token", "" if request.ttft is None else f"after {spent(request.ttft)}", PLAIN),
        ("outcome", request.outcome or "under way", BAD if failed else PLAIN),
        ("log", f"number={request.number} in the router's log", PLAIN),
    ]
    return [(label, text, KINDS[kind]) for label, text, kind in facts if text]
