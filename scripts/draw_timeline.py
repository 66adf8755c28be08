"""Draws the timeline of one request before vLLM, without and with overlap, from the spans of a real deployment.

    .venv-vllm/bin/python scripts/draw_timeline.py [--into docs/timeline.svg] [--spans FILE]

One encoder and one language instance, and two routers before them, which are asked in turns. Of each router, the
request of median length is drawn. ``--spans`` keeps the spans in a file, or draws those of a file that exists.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.collector import Seen, collecting  # noqa: E402
from tests.serve.vllm.servers import TracedServers, picture  # noqa: E402
from tests.serve.vllm.stubs import text  # noqa: E402

WARMING, MEASURED = 2, 15
SIZE = 756, 420
"""Pixels of each picture."""
TOKENS = 8
TITLES = {"off": "before: encode first (vllm.overlap off)", "pictures": "after: overlapped (vllm.overlap pictures)"}
WIDTH, LEFT, RIGHT, ROW, HEAD = 860, 240, 60, 22, 34
STYLE = """
.back { fill: #ffffff } .ink { fill: #0f172a } .soft { fill: #57606a } .grid { stroke: #d8dee4 }
.router { fill: #64748b } .encode { fill: #2563eb } .transfer { fill: #059669 } .language { fill: #d97706 }
.waits { fill: none; stroke: #d97706; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } .ink { fill: #e6edf3 } .soft { fill: #9da7b3 } .grid { stroke: #30363d }
.router { fill: #94a3b8 } .encode { fill: #60a5fa } .transfer { fill: #34d399 } .language { fill: #fbbf24 }
.waits { stroke: #fbbf24 } }
"""


class Bar(NamedTuple):
    """One row: who does what, from when to when, in milliseconds since the request arrived."""

    kind: str
    label: str
    began: float
    ended: float


def bars(spans: Iterable[Seen]) -> list[Bar]:
    """Returns the rows of one request."""
    by_name = {f"{one.service.removesuffix('-0')} {one.name}": one for one in spans}
    root = by_name["embferry-router POST /v1/chat/completions"]

    def ms(moment: float) -> float:
        return (moment - root.began) / 1e6

    def told(span: Seen, name: str) -> float:
        return float(span.attributes[f"gen_ai.latency.{name}"]) * 1e9

    encode, language = by_name["vllm-encode llm_request"], by_name["vllm-language llm_request"]
    fetch, transfer = by_name["embferry-router fetch"], by_name["embferry-connector transfer"]
    encoded = encode.began + told(encode, "e2e")
    ended = language.began + told(language, "e2e")
    first = ended - told(language, "time_in_model_decode")
    scheduled = first - told(language, "time_in_model_prefill")
    queued = scheduled - told(language, "time_in_queue")
    loads = max(scheduled, transfer.ended)  # vLLM tells only when it first looked at the request
    forward = encoded - told(encode, "time_in_model_inference")
    return [
        Bar("router", "router reads the request", ms(fetch.began), ms(fetch.ended)),
        Bar("encode", "encode instance prepares", ms(encode.began), ms(forward)),
        Bar("encode", "encode instance encodes", ms(forward), ms(encoded)),
        Bar("transfer", "transfer, while it is open", ms(transfer.began), ms(transfer.ended)),
        Bar("language", "language instance prepares", ms(language.began), ms(queued)),
        Bar("waits", "its request waits for the picture", ms(queued), ms(loads)),
        Bar("language", "language instance prefills", ms(loads), ms(first)),
        Bar("language", f"{TOKENS} tokens of the answer", ms(first), ms(ended)),
    ]


def drawn(panels: dict[str, list[Bar]]) -> str:
    """Returns the SVG."""
    longest = max(bar.ended for rows in panels.values() for bar in rows)
    scale = (WIDTH - LEFT - RIGHT) / longest
    step = next(step for step in (5, 10, 20, 25, 50, 100, 200, 500, 1000) if longest / step <= 12)
    lines: list[str] = []
    top = 10
    for overlap, rows in panels.items():
        bottom = top + HEAD + ROW * len(rows)
        lines.append(f'<text class="ink" x="16" y="{top + 18}" font-weight="600">{escape(TITLES[overlap])}</text>')
        for at in range(0, int(longest) + 1, step):
            x = LEFT + at * scale
            lines.append(f'<path class="grid" d="M{x:.1f} {top + HEAD - 4}V{bottom}"/>')
            lines.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{at}</text>')
        lines.append(f'<text class="soft" x="{WIDTH - 16}" y="{bottom + 14}" text-anchor="end">ms</text>')
        for number, bar in enumerate(rows):
            y = top + HEAD + ROW * number
            begin, width = LEFT + bar.began * scale, max(1.0, (bar.ended - bar.began) * scale)
            lines.append(f'<text class="ink" x="{LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(bar.label)}</text>')
            place = f'x="{begin:.1f}" y="{y + 2}" width="{width:.1f}" height="14" rx="2"'
            lines.append(f'<rect class="{bar.kind}" {place}/>')
            told = f"{bar.ended - bar.began:.0f}"
            lines.append(f'<text class="soft" x="{begin + width + 5:.1f}" y="{y + 13}">{told}</text>')
        top = bottom + 34
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="system-ui, sans-serif"'
    return "\n".join(
        [f'{head} font-size="12">', f"<style>{STYLE}</style>", f'<rect class="back" width="{WIDTH}" height="{top}"/>',
         *lines, "</svg>", ""]
    )  # fmt: skip


def measured(folder: Path) -> dict[str, list[Seen]]:
    """Returns the spans of a request of median length at each router."""
    with collecting() as collector:
        servers = TracedServers(folder, collector.url)
        try:
            servers.wait("ready:")
            routers = {"off": servers.another_router("off"), "pictures": servers.url}
            found: dict[str, list[list[Seen]]] = {overlap: [] for overlap in routers}
            for number in range(WARMING + MEASURED):
                for overlap, url in routers.items():
                    trace = secrets.token_hex(16)
                    content = picture(10 * number + (overlap == "off"), *SIZE), text()
                    parent = f"00-{trace}-{secrets.token_hex(8)}-01"
                    servers.ask(*content, url=url, traceparent=parent, max_tokens=TOKENS)
                    spans = collector.wait(lambda spans, trace=trace: is_whole(of(spans, trace)))  # type: ignore[misc]
                    if number >= WARMING:
                        found[overlap].append(of(spans, trace))
        finally:
            servers.close()
    return {overlap: sorted(requests, key=length)[MEASURED // 2] for overlap, requests in found.items()}


def of(spans: Sequence[Seen], trace: str) -> list[Seen]:
    return [one for one in spans if one.trace == trace]


def is_whole(spans: Sequence[Seen]) -> bool:
    """Returns whether all spans of a request are here."""
    counts = {name: sum(one.name == name for one in spans) for name in ("llm_request", "transfer", "fetch")}
    return counts == {"llm_request": 2, "transfer": 1, "fetch": 1} and any(one.kind == "server" for one in roots(spans))


def roots(spans: Sequence[Seen]) -> list[Seen]:
    return [one for one in spans if one.service == "embferry-router" and one.kind == "server"]


def length(spans: Sequence[Seen]) -> int:
    (root,) = roots(spans)
    return root.ended - root.began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "timeline.svg")
    parser.add_argument("--spans", type=Path)
    chosen = parser.parse_args()
    if chosen.spans is not None and chosen.spans.exists():
        told: dict[str, list[dict[str, Any]]] = json.loads(chosen.spans.read_text())
        found = {overlap: [Seen(**one) for one in spans] for overlap, spans in told.items()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(Path(folder))
        if chosen.spans is not None:
            chosen.spans.write_text(json.dumps({overlap: list(map(asdict, spans)) for overlap, spans in found.items()}))
    panels = {overlap: bars(spans) for overlap, spans in found.items()}
    chosen.into.write_text(drawn(panels))
    for overlap, rows in panels.items():
        print(overlap)
        for bar in rows:
            print(f"  {bar.label}: {bar.began:.1f} to {bar.ended:.1f} ms")


if __name__ == "__main__":
    main()
