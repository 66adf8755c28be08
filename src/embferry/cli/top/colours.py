"""The colours of the screen: those of the live page, dark. Phases have letters too, for terminals without colours."""

from __future__ import annotations

from rich.style import Style

from embferry.cli.activity.words import BAD, GOOD, MOVED, PLAIN, WARN

BACKGROUND, CARD, LINE, TEXT, SOFT_COLOUR = "#0d1319", "#151d26", "#2a3643", "#e8eef4", "#9fb0c0"
ACCENT = "#58b4f5"
_GOOD, _WARN, _BAD = "#4fd19b", "#f0b453", "#ff8a80"
PHASES = {
    "fetch": "#7d8c9c",
    "encode": "#e8ad3f",
    "transfer": "#3a9ee6",
    "prefill": "#c983d3",
    "decode": "#35bd8d",
    "answer": "#8797e3",
}
ABOUT = {
    "fetch": "the request's body, and its pictures from elsewhere",
    "encode": "pictures are decoded, and the vision encoder runs",
    "transfer": "from the first token of the embedding to the last, with all resumed transfers",
    "prefill": "the language model reads the prompt",
    "decode": "the answer, token by token",
    "answer": "transfer, prefill and, without a stream, decode: an instance of vLLM tells of none of them",
}
SOFT = Style(color=SOFT_COLOUR)
FAINT = Style(color="#5c6d7e")
STRONG = Style(color=TEXT, bold=True)
KINDS = {
    GOOD: Style(color=_GOOD, bold=True),
    MOVED: Style(color=ACCENT, bold=True),
    WARN: Style(color=_WARN, bold=True),
    BAD: Style(color=_BAD, bold=True),
    PLAIN: STRONG,
}


def phase_colour(name: str) -> str:
    """Returns the colour of a phase, also of one that this version does not know."""
    return PHASES.get(name, SOFT_COLOUR)
