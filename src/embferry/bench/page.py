"""Results as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from html import escape

from .plots import drawings
from .report import Row, Table, facts, tables
from .results import Results

STYLE = """
:root { --ink: #1f2328; --soft: #57606a; --line: #d8dee4; --ground: #f6f8fa; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0; background: var(--ground); }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .2rem; }
p.lead, p.note { color: var(--soft); margin: 0 0 1rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.3rem 1.5rem; margin: 1.4rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 1rem 0 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: .3rem .6rem; } th { white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid #eef1f4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.ours td:first-child { color: #1f6feb; font-weight: 600; }
tr.engine td:first-child { color: #b5670f; } tr.peer td:first-child { color: #953d87; }
tr.limit td, tr.unmeasured td { color: var(--soft); }
tr.missing td, tr.error td, tr.skipped td { color: #b42318; white-space: normal; text-align: left; }
.badge { border-radius: 1em; padding: .05rem .7em; font-size: .8rem; font-weight: 600; }
.yes .badge { background: #dafbe1; color: #116329; } .no .badge { background: #ffebe9; color: #b42318; }
.targets td { white-space: normal; } .targets td:nth-child(2) { white-space: nowrap; }
"""
_ID = re.compile(r'(id="|href="#|url\(#)')


def html(results: Results) -> str:
    """The whole page."""
    *rest, targets = tables(results)
    drawn = [_section(title, note, _own_ids(svg, index)) for index, (title, note, svg) in enumerate(drawings(results))]
    described = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in facts(results))
    body = [
        f"<section><h2>This run</h2><dl>{described}</dl></section>",
        _section(targets.title, "Ratios within this run.", _table(targets, "targets", badge=True)),
        *drawn,
        *(_section(table.title, table.note, _table(table)) for table in rest),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>embferry bench transfer</title><style>{STYLE}</style></head><body><main>"
        "<h1>How fast embeddings travel</h1>"
        '<p class="lead">Every transport of embferry beside what else could have been used: the same bytes, in separate '
        "processes that take turns, from a tensor of one to a tensor of the other.</p>"
        f"{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, note: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{content}</section>'


def _own_ids(svg: str, index: int) -> str:
    """Drawings on one page must not share the names of their parts."""
    return _ID.sub(lambda match: f"{match[1]}d{index}-", svg)


def _table(table: Table, name: str = "", *, badge: bool = False) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(_row(row, len(table.columns), badge) for row in table.rows)
    return f'<div class="scroll"><table class="{name}"><tr>{head}</tr>{rows}</table></div>'


def _row(row: Row, columns: int, badge: bool) -> str:
    cells = [escape(cell) for cell in row.cells]
    if row.failed:
        return f'<tr class="{row.kind}"><td>{cells[0]}</td><td colspan="{columns - 1}">{cells[1]}</td></tr>'
    if badge:
        cells[-1] = f'<span class="badge">{cells[-1]}</span>'
    return f'<tr class="{row.kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
