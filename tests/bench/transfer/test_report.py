"""The report of a transfer benchmark: which transport first, our own targets last."""

from __future__ import annotations

from embferry.bench.transfer.report import Reached, reached, report
from embferry.bench.transfer.results import Measurement
from tests.bench.transfer import examples
from tests.bench.transfer.examples import measured, point, results, sample


def test_the_first_table_orders_the_transports_and_names_no_limit() -> None:
    answer = report(examples.everything()).tables[0]
    assert [row.cells[0] for row in answer.rows] == ["shm", "tcp", "fastest other way"]
    assert answer.rows[0].cells[1] == "11.00"  # in place, which is faster than gathered


def test_unverified_variants_do_not_stand_for_a_transport() -> None:
    made = report(results(measured("shm/unverified/in-place", 0.1), measured("shm/verified/gathered", 0.5)))
    assert made.tables[0].rows[0].cells[1] == "500.00"


def test_candidates_are_ordered_by_speed_and_those_without_figures_are_last() -> None:
    rows = report(examples.everything()).tables[1].rows
    assert [row.cells[0].split(",")[0] for row in rows[:2]] == ["memory copy", "shm"]
    assert [row.kind for row in rows[-2:]] == ["missing", "error"]


def test_only_the_targets_are_folded() -> None:
    whole = report(examples.everything())
    assert [table.title for table in whole.tables if table.folded] == ["Our own targets"]
    assert whole.tables[-1].folded
    assert all(len(row.cells) == len(table.columns) or row.failed for table in whole.tables for row in table.rows)


def target(what: str, *measurements: Measurement) -> Reached | None:
    return next((found for found in reached(results(*measurements)) if found.what.startswith(what)), None)


def test_a_target_compares_two_candidates_of_one_run() -> None:
    name = "shm/verified, 67 MB in place: goodput / copy/private"
    assert target(name, measured("shm/verified/in-place", 0.1)) is None
    fast, slow, copy = (
        measured("shm/verified/in-place", 0.1),
        measured("shm/verified/in-place", 1.0),
        measured("copy/private", 0.08),
    )
    met, missed = target(name, fast, copy), target(name, slow, copy)
    assert met is not None
    assert (round(met.value, 2), met.met) == (0.8, True)
    assert missed is not None
    assert (round(missed.value, 2), missed.met) == (0.08, False)


def test_a_target_compares_two_points_of_a_sweep() -> None:
    whole, small = point("pool", "tcp", 1, sample(1.0)), point("pool", "tcp", 0.02, sample(2.0))
    found = target("tcp: goodput with 1/50", whole, small)
    assert found is not None
    assert (found.bound, found.value, found.met) == (0.8, 0.5, False)


def test_small_embeddings_behind_a_large_one_are_shown_without_it() -> None:
    (table,) = [table for table in report(examples.everything()).tables if table.title.startswith("Small")]
    assert table.rows[0].cells == ("shm, 1", "750.00", "1000.00")
