"""An encode worker returns the memory of requests to the system, and an error keeps none of it."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path

import pytest

from embferry.serve.encode.freed_memory import LEAST_BYTES, FreedMemory, dropping_locals
from tests.serve.pictures import video
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import run

FRAMES, SIZE = 60, (1920, 1080)
DECODED = 4 * FRAMES * SIZE[0] * SIZE[1]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.integration
def test_videos_leave_no_memory_behind(join: MakeJoined) -> None:
    """Some kilobytes become half a gigabyte of frames. The C library kept as much for each thread that decodes."""
    joined = join(media={"video_fps": 10})
    film = {"kind": "video", "data": video(FRAMES, size=SIZE)}
    run(joined.ask("what?", {"kind": "video", "data": video(4)}))
    before = resident()
    for question in ("one", "two", "three"):
        run(joined.ask(question, film))
    joined.wait(lambda: joined.encode.load == 0)
    assert joined.encode.budget.held == 0
    joined.wait(lambda: resident() - before < DECODED // 3)


def test_little_memory_is_not_returned() -> None:
    """The next request needs it again."""
    trims: list[None] = []
    freed = FreedMemory(lambda: trims.append(None))
    with freed.counting(lambda nbytes: None) as grow:
        for _ in range(4):
            grow(LEAST_BYTES // 4)
            freed.give_back()
        assert not trims, "it is still in use"
    freed.give_back()
    freed.give_back()
    assert len(trims) == 1
    freed.add(LEAST_BYTES - 1)
    freed.give_back()
    assert len(trims) == 1


def test_what_was_refused_counts_only_as_far_as_it_was_taken() -> None:
    freed = FreedMemory()

    def refuse(nbytes: int) -> None:
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"), freed.counting(refuse) as grow:
        grow(LEAST_BYTES)
    assert freed._freed == 0


class Frame:
    """Something large."""


def test_an_error_keeps_nothing_of_its_functions_alive() -> None:
    held: list[weakref.ref[Frame]] = []

    def decode() -> None:
        frame = Frame()
        held.append(weakref.ref(frame))
        raise KeyError

    def prepare() -> None:
        frames = [Frame()]
        held.append(weakref.ref(frames[0]))
        try:
            decode()
        except KeyError as error:
            raise ValueError from error

    with pytest.raises(ValueError, match=r"^$") as caught, dropping_locals():
        prepare()
    assert caught.tb is not None
    assert len(held) == 2
    assert [frame() for frame in held] == [None, None]
