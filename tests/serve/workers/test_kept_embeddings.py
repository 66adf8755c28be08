"""A language worker is killed in the middle of a transfer: the next one on the host goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from embferry.kept.form import HEAD_BYTES, read_records
from embferry.serve.config import LanguageSettings, Settings
from embferry.serve.supervisor import LocalCluster, ProcessView
from embferry.serve.supervisor.temporary import LOCK
from embferry.serve.undivided import UndividedAnswer
from tests.serve.workers.test_processes import START, wait
from tests.serve.workers.test_what_survives import (
    Asking,
    answered,
    body_of,
    encodes,
    metric,
    named,
    of_role,
    restarted,
    settings_of,
    undivided,
    wait_whole,
)

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

SEEDS = itertools.count(1000)
LEAST = 5
"""Tokens that have arrived when the worker is killed, at least."""


def settings_for(workers: int, **language: int) -> Settings:
    settings = settings_of(workers)
    router = settings.router.model_copy(update={"stall_timeout": START})  # the tests suspend workers
    return settings.model_copy(update={"router": router, "language": LanguageSettings(**language)})


@contextlib.contextmanager
def running(settings: Settings, logs: Path) -> Iterator[LocalCluster]:
    """Runs a cluster. At its end, nothing is left in its folder in memory, and then not the folder either."""
    with LocalCluster(settings, logs=logs / "log") as cluster:
        cluster.wait_ready(START)
        yield cluster
        place = place_of(cluster)
        wait(lambda: os.listdir(place) == [LOCK], "an empty folder")
    assert not place.exists()


def place_of(cluster: LocalCluster) -> Path:
    path = cluster._kept.path
    assert path is not None
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with running(settings_for(1), tmp_path_factory.mktemp("single")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with running(settings_for(2), tmp_path_factory.mktemp("pair")) as cluster:
        yield cluster


def file_of(cluster: LocalCluster) -> Path | None:
    """Returns the file of the embedding that is under way."""
    found = [path for path in place_of(cluster).iterdir() if path.name != LOCK]
    return found[0] if found else None


def recorded(path: Path | None, total: int) -> int:
    """Returns the tokens that a file says to have."""
    with contextlib.suppress(FileNotFoundError):
        data = b"" if path is None else path.read_bytes()
        return sum(record.length for record in read_records(data[HEAD_BYTES:], total))
    return 0


def uses(view: ProcessView, path: Path) -> bool:
    """Returns whether a process has a file open."""
    for fd in os.listdir(f"/proc/{view.pid}/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{view.pid}/fd/{fd}"), path.stat()):
                return True
    return False


@contextlib.contextmanager
def suspended(*views: ProcessView) -> Iterator[None]:
    try:
        for view in views:
            os.kill(view.pid, signal.SIGSTOP)
            wait(lambda view=view: _state(view) == "T", "a suspended process")  # type: ignore[misc]
        yield
    finally:
        for view in views:
            with contextlib.suppress(ProcessLookupError):
                os.kill(view.pid, signal.SIGCONT)


def _state(view: ProcessView) -> str:
    return Path(f"/proc/{view.pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill_half_way(cluster: LocalCluster) -> tuple[Asking, UndividedAnswer, ProcessView, int, int]:
    """Asks about a video, and kills the language worker in the middle of its transfer.

    All workers are suspended before, so that it is known how much has arrived, and the encode workers until the kernel
    has cleared up behind the killed one.

    Returns:
        The request, the right answer, the killed worker, the tokens that had arrived, and the seed of the video.
    """
    while True:
        seed = next(SEEDS)
        expected = undivided(seed)
        total = expected.visual_tokens
        wait_whole(cluster)
        asking = Asking(cluster, body_of(seed)).__enter__()
        wait(lambda: recorded(file_of(cluster), total) >= LEAST or asking.status > 0, "the first tokens")  # noqa: B023
        with suspended(*of_role(cluster, "encode"), *of_role(cluster, "language")):
            path = file_of(cluster)
            count = recorded(path, total)
            if path is not None and LEAST <= count < total:
                (killed,) = (view for view in of_role(cluster, "language") if uses(view, path))
                os.kill(killed.pid, signal.SIGKILL)
                wait(partial(_is_gone, cluster, killed), "the end of the killed one")
                return asking, expected, killed, count, seed
        asking.__exit__()  # the transfer was faster than this test


def _is_gone(cluster: LocalCluster, view: ProcessView) -> bool:
    """Returns whether the supervisor has noticed the end of a process."""
    return named(cluster, view.name).pid != view.pid


def kept(cluster: LocalCluster, *but: str) -> float:
    views = [view for view in of_role(cluster, "language") if view.url and view.name not in but]
    return sum(metric(view.url, "language_kept_tokens_total") for view in views)


def check_answer(asking: Asking, expected: UndividedAnswer, count: int) -> None:
    """Checks that the answer is right, and that no token was sent twice. Each transfer moves one."""
    assert asking.status == 200, asking.lines
    told = asking.json()["embferry"]
    assert tuple(told["tokens"]) == expected.tokens
    transfer = told["transfer"]
    assert (transfer["total_tokens"], transfer["kept_tokens"]) == (expected.visual_tokens, count)
    assert transfer["initial"] + transfer["resumed"] == expected.visual_tokens - count


def test_a_worker_that_restarts_goes_on_where_it_was(single: LocalCluster) -> None:
    encoded = encodes(single)
    asking, expected, killed, count, seed = kill_half_way(single)
    with restarted(single, killed):
        asking.__exit__()
    asking.check_says_when("worker_failed", "no_worker")
    encoded_now = encodes(single)
    assert encoded_now > encoded
    again = answered(single, seed)
    check_answer(again, expected, count)
    assert kept(single) == count
    assert encodes(single) == encoded_now


def test_another_worker_on_the_host_goes_on_where_a_killed_one_was(pair: LocalCluster) -> None:
    asking, expected, killed, count, _ = kill_half_way(pair)
    with restarted(pair, killed):
        asking.__exit__()
    check_answer(asking, expected, count)
    assert kept(pair, killed.name) == count
    assert metric(pair.url, "router_chat_second_attempts_total") >= 1


def test_the_folder_is_closed_to_others(pair: LocalCluster) -> None:
    assert stat.S_IMODE(place_of(pair).stat().st_mode) == 0o700
