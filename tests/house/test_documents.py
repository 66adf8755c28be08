from __future__ import annotations

import check_lengths
import draw_states
from embferry.disaggregation.protocol.states import RECEIVER, SENDER, Phase


def test_the_state_diagrams_are_those_of_the_tables():
    assert draw_states.main(["--check"]) == 0


def test_a_page_that_is_out_of_date_is_noticed_and_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw_states, "DOCUMENT", tmp_path / "state-diagrams.md")
    assert draw_states.main(["--check"]) == 1
    assert draw_states.main([]) == 0
    assert draw_states.main(["--check"]) == 0
    draw_states.DOCUMENT.write_text(draw_states.DOCUMENT.read_text() + "more")
    assert draw_states.main(["--check"]) == 1
    assert "make docs" in capsys.readouterr().out


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


def test_a_file_of_401_lines_is_one_too_long(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "fits.py").write_text("pass\n" * 400)
    assert check_lengths.main(tmp_path) == 0
    (tmp_path / "src" / "long.py").write_text("pass\n" * 401)
    assert check_lengths.too_long(tmp_path) == [("src/long.py", 401)]
    assert check_lengths.main(tmp_path) == 1
    assert "long.py: 401 lines" in capsys.readouterr().out
