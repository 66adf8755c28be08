"""Draws ``docs/state-diagrams.md`` from the transition tables in ``protocol/states.py``.

    python scripts/draw_states.py [--check]

With ``--check`` nothing is written; it ends with 1 if the document is stale.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from embferry.protocol.states import POLL, RECEIVER, SENDER, TERMINAL, Phase, Table, Trigger
from generated_page import write_or_check

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "state-diagrams.md"

HEAD = """\
# States

Drawn from the tables in `src/embferry/protocol/states.py` by `scripts/draw_states.py`; change the
tables, not this page. A transition that is not here does not exist.
"""


def document() -> str:
    """The whole page."""
    parts = [HEAD, "## Phases\n", phases(), "## Triggers\n", triggers()]
    for title, table in (("The receiver", RECEIVER), ("The sender", SENDER)):
        parts += [f"## {title}\n", diagram(table), transitions(table)]
    return "\n".join(parts)


def phases() -> str:
    rows = [f"| `{phase.name}` | {phase.value} | `{POLL[phase].name}` ({POLL[phase].value}) |" for phase in Phase]
    return table(("phase", "meaning", "what `poll()` answers"), rows)


def triggers() -> str:
    return table(("trigger", "meaning"), [f"| `{trigger.name}` | {trigger.value} |" for trigger in Trigger])


def diagram(transitions: Table) -> str:
    """Mermaid; triggers that lead from one phase to the same other one share an arrow."""
    order = list(Phase)
    arrows = sorted(((order.index(a), order.index(b), t.name) for (a, t), b in transitions.items()))
    lines = [f"    [*] --> {order[0].name}"]
    for (a, b), group in groupby(arrows, key=lambda arrow: arrow[:2]):
        lines.append(f"    {order[a].name} --> {order[b].name}: {', '.join(name for _, _, name in group)}")
    lines += [f"    {phase.name} --> [*]" for phase in Phase if phase in TERMINAL]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```", ""])


def transitions(transitions: Table) -> str:
    """A matrix: phases down, triggers across."""
    used = [trigger for trigger in Trigger if any(t is trigger for _, t in transitions)]
    rows = []
    for phase in Phase:
        cells = [transitions.get((phase, trigger)) for trigger in used]
        if any(cells):
            rows.append(f"| `{phase.name}` | {' | '.join(cell.name if cell else '–' for cell in cells)} |")
    return table(("from", *(f"`{trigger.name}`" for trigger in used)), rows)


def table(head: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, ""])


if __name__ == "__main__":
    sys.exit(write_or_check(DOCUMENT, document()))
