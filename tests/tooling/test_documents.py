from __future__ import annotations

import draw_states
from embferry.protocol.states import RECEIVER, SENDER, Phase


def test_the_state_diagrams_are_those_of_the_tables():
    assert draw_states.main(["--check"]) == 0


def test_every_transition_is_drawn_and_no_other():
    for table in (RECEIVER, SENDER):
        lines = [line.strip() for line in draw_states.diagram(table).splitlines() if ": " in line]
        drawn = {
            (start, trigger): end
            for start, _, rest in (line.partition(" --> ") for line in lines)
            for end, _, triggers in [rest.partition(": ")]
            for trigger in triggers.split(", ")
        }
        assert drawn == {(a.name, t.name): b.name for (a, t), b in table.items()}
        assert f"[*] --> {Phase.BOOTSTRAPPING.name}" in draw_states.diagram(table)
