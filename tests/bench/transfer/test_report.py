"""The report of a transfer benchmark: which transport first, our own targets last."""

from __future__ import annotations

from embferry.bench.transfer.payloads import SMALL
from embferry.bench.transfer.report import report
from embferry.bench.transfer.results import Measurement
from embferry.bench.transfer.targets import Reached, reached
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
    name = "shm/verified/in-place, 67 MB: goodput / copy/private"
    assert target(name, measured("shm/verified/in-place", 0.1)) is None
    fast, slow, copy = (
        measured("shm/verified/in-place", 0.1),
        measured("shm/verified/in-place", 1.0),
        measured("copy/private", 0.08),
    )
    met, missed = target(name, fast, copy), target(name, slow, copy)
    assert met is not None
    assert (met.bound, round(met.value, 2), met.met) == ("≥ 0.62", 0.8, True)
    assert missed is not None
    assert (round(missed.value, 2), missed.met) == (0.08, False)


def test_times_of_small_embeddings_have_an_upper_bound() -> None:
    raw, ours = measured("socket", 0.1, payload=SMALL), measured("tcp/verified/in-place", 0.2, payload=SMALL)
    found = target("tcp, 1 MiB verified", raw, ours)
    assert found is not None
    assert (found.bound, found.value, found.met) == ("≤ 1.5", 2.0, False)


def test_a_target_compares_two_points_of_a_sweep() -> None:
    whole, small = point("pool", "tcp", 1, sample(1.0)), point("pool", "tcp", 0.02, sample(2.0))
    found = target("tcp, pool of 1/50", whole, small)
    assert found is not None
    assert (found.bound, found.value, found.met) == ("≥ 0.8", 0.5, False)


def test_the_cost_of_resumed_transfers_is_that_of_the_pool_with_the_nearest_number_of_them() -> None:
    pools = [(1, 1, 1.0), (0.5, 7, 1.01), (0.2, 24, 1.02), (0.04, 110, 1.3), (0.02, 400, 3.0)]
    points = [point("pool", "shm", share, sample(seconds, transfers=n)) for share, n, seconds in pools]
    values = [found.value for found in reached(results(*points)) if "transfers / of one" in found.what]
    assert values == [1.02, 1.3]


def test_costs_and_waits_of_small_transfers_are_targets() -> None:
    found = {t.what: round(t.value, 3) for t in reached(examples.everything())}
    assert found["shm, 1 token: CPU ms of the sender"] == 1.0
    assert found["shm, 1 token: CPU ms of the receiver"] == 2.0
    assert found["tcp, 64 KiB, 64 at once: transfers a second"] == 1000.0
    assert found["shm, 1 MiB behind 403 MB: p99 / alone"] == round(1.98 / 0.298, 3)
    assert found["1 token, 10,000 rooms open / 10: CPU of the sender"] == 1.0


def test_several_runs_make_one_table_of_targets_with_the_median_and_the_spread() -> None:
    runs = [
        results(measured("shm/verified/in-place", seconds), measured("copy/private", 0.1))
        for seconds in (0.1, 0.2, 0.125)
    ]
    (table,) = [table for table in report(*runs).tables if table.title == "Our own targets"]
    (row,) = table.rows
    assert table.columns == ("what", "bound", "median", "least", "greatest", "met")
    assert (row.cells[1:], row.kind, table.folded) == (("≥ 0.62", "0.8", "0.5", "1", "yes"), "good", False)


def test_a_failure_in_any_of_several_runs_is_a_problem() -> None:
    failed = results(examples.left_out("socket", "error", "it broke"))
    assert len(report(results(), failed).problems) == 1


def test_waits_behind_a_large_embedding_and_costs_of_small_transfers_are_shown() -> None:
    tables = {table.title: table.rows for table in report(examples.everything()).tables}
    assert tables["Small embeddings behind a large one"][1].cells == ("shm, 1", "1000.00", "1980.00", "2000.00")
    assert tables["Small transfers"][0].cells == ("shm, 1", "100", "1.00", "1.000", "2.000")
    assert tables["Small transfers"][1].cells == ("tcp, 64", "1000", "–", "0.100", "0.200")
