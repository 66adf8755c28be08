"""Damage to the servers, and to some requests, while a workload runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import httpx
import msgspec

from . import corruption
from .client import Endpoint, send_all
from .configurations import Damage
from .results import Run, Sample
from .stack import Stack
from .workload import Picture, Request

AFTER = 1 / 3
"""The share of requests after which something happens."""
KILL_DELAY_S = 0.1
"""After a request was sent, so that its pictures are being encoded."""
PAUSE_S = 1.0
"""How long it takes at most until a request that was sent is with an encoder."""
GONE_S = 6.0
"""How long the encoders stand still after a client has hung up. SGLang looks every 4 s whether clients are there."""
ANSWER_S, ABORT_S = 60.0, 10.0
REUSED_ID = "used-twice"
ANOTHER = Picture((6, 0), 420, 756, 405)
"""The picture of the request that is damaged, hangs up or is aborted."""

Sent = Callable[[int, float], None]
"""Called when a request was sent, with its number and the seconds since the run began; may not block."""
Fault = Callable[[Stack, Run, int], AbstractContextManager[Sent]]
"""Its arguments are the servers, the run, which gets notes, and the number of requests."""

_CORRUPTED = {"example": f"the last {corruption.TAIL:.0%} of a file zeroed", "embferry": "a bit flipped"}
"""How bytes are corrupted, by connector."""


def number_of_victim(count: int) -> int:
    """Returns the number of the request at which something happens, of ``count``."""
    return round(count * AFTER)


@contextmanager
def at_request(number: int, act: Callable[[float], None]) -> Iterator[Sent]:
    """Yields a function that calls ``act`` on a thread of its own when the request ``number`` was sent."""
    threads: list[threading.Thread] = []

    def sent(other: int, at: float) -> None:
        if other == number:
            threads.append(threading.Thread(target=act, args=(at,)))
            threads[-1].start()

    try:
        yield sent
    finally:
        for thread in threads:
            thread.join()


@contextmanager
def nothing(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    yield lambda number, at: None


@contextmanager
def corrupted(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    """Embeddings are damaged on their way (:mod:`.corruption`)."""
    stack.damage.touch()
    try:
        yield lambda number, at: None
    finally:
        times = stack.damage.stat().st_size
        run.notes.append(f"{run.title}: {_CORRUPTED[stack.configuration.connector]}, {times} times")
        stack.damage.unlink()


@contextmanager
def killed(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    def kill(at: float) -> None:
        time.sleep(KILL_DELAY_S)
        stack.encoders[0].kill()
        run.damaged_at = at + KILL_DELAY_S
        run.notes.append(f"at {run.damaged_at:.1f} s one of two encoders was killed (SIGKILL) and not started again")

    with at_request(number_of_victim(count), kill) as sent:
        yield sent


@contextmanager
def stopped(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    """One of two encoders stands still from a request on until the last one has ended."""
    with ExitStack() as until_the_end:

        def stop(at: float) -> None:
            time.sleep(KILL_DELAY_S)
            until_the_end.enter_context(stack.encoders[0].stopped())
            run.damaged_at = at + KILL_DELAY_S
            run.notes.append(f"at {run.damaged_at:.1f} s one of two encoders was stopped (SIGSTOP) until the end")

        with at_request(number_of_victim(count), stop) as sent:
            yield sent


@contextmanager
def damaged_picture(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    """One more request comes, whose picture is cut short."""

    def send(at: float) -> None:
        run.damaged_at = at
        answer = one_more(stack.endpoint(4, ANSWER_S, 1), msgspec.structs.replace(ANOTHER, cut_short=True))
        run.notes.append(f"{run.title}: one more request, with a damaged picture: {answer.error or 'answered'}")

    with at_request(number_of_victim(count), send) as sent:
        yield sent


@contextmanager
def client_hangs_up(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    """The client of one more request hangs up while its picture is with an encoder: the encoders stand still."""

    def send(at: float) -> None:
        run.damaged_at = at
        with all_stopped(stack):
            one_more(stack.endpoint(4, PAUSE_S, 1), ANOTHER)
            time.sleep(GONE_S)
        run.notes.append(f"{run.title}: the client of one more request hung up after {PAUSE_S:g} s")

    with at_request(number_of_victim(count), send) as sent:
        yield sent


@contextmanager
def id_used_again(stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    """One more request is aborted while its picture is with an encoder; a later one has its id, and another picture.

    The encoders stand still from before the first of the two until the second was sent.
    """
    second, again = number_of_victim(count), threading.Event()

    def send(at: float) -> None:
        run.damaged_at = at
        with all_stopped(stack):
            endpoint = stack.endpoint(4, ANSWER_S, 1)
            first = threading.Thread(target=one_more, args=(endpoint, ANOTHER, REUSED_ID))
            first.start()
            time.sleep(PAUSE_S)
            try:
                httpx.post(f"{endpoint.url}/abort_request", json={"rid": REUSED_ID}, timeout=ABORT_S, trust_env=False)
            except httpx.HTTPError as error:
                run.notes.append(f"{run.title}: the abort failed: {type(error).__name__}")
            again.wait(ANSWER_S)
            time.sleep(PAUSE_S)
        first.join()
        run.notes.append(f"{run.title}: one more request was aborted, and request {second} had its id again")

    with at_request(second - 1, send) as sent:

        def told(number: int, at: float) -> None:
            sent(number, at)
            if number == second:
                again.set()

        yield told


@contextmanager
def all_stopped(stack: Stack) -> Iterator[None]:
    with ExitStack() as meanwhile:
        for encoder in stack.encoders:
            meanwhile.enter_context(encoder.stopped())
        yield


def one_more(endpoint: Endpoint, picture: Picture, rid: str = "") -> Sample:
    """Sends a request that does not belong to the workload, and returns what came."""
    run = Run(endpoint.url, endpoint.model)
    send_all(endpoint, [Request(0, 0.0, (picture,), rid=rid)], run)
    return run.samples[0]


FAULTS: Mapping[Damage, Fault] = {
    "": nothing,
    "two ranks": nothing,
    "small pool": nothing,
    "corrupted": corrupted,
    "killed": killed,
    "stopped": stopped,
    "damaged picture": damaged_picture,
    "client hangs up": client_hangs_up,
    "id used again": id_used_again,
}
