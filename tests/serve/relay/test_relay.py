"""Every fault in every hop, in both directions, at one place. ``make relay`` tries more places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from embferry.transfer.control import framing
from tests.serve.relay.messages import ControlFrames, HttpRequests
from tests.serve.relay.stack import relayed_stack
from tests.serve.relay.table import ENGINES, HOPS, Combination, combinations
from tests.serve.relay.trial import Asked, Trials


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked.make()


@pytest.fixture(scope="module")
def trials_over(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Trials]]:
    """Returns a function that returns the trials at the stack of a transport; one stack runs at a time."""
    made: dict[str, Trials] = {}
    with ExitStack() as running:

        def over(transport: str) -> Trials:
            if transport not in made:
                made.clear()
                running.close()
                stack = running.enter_context(relayed_stack(transport, tmp_path_factory.mktemp("relay") / "log"))
                made[transport] = Trials(stack, asked)
                made[transport].prepare()
            return made[transport]

        yield over


def _cases() -> Iterator[Any]:
    for transport in HOPS:
        mark = pytest.mark.engines if transport in ENGINES else pytest.mark.sweeps
        for combination in combinations(transport, places=(0.3,)):
            yield pytest.param(combination, marks=mark, id=str(combination))


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("combination", [*_cases()])
def test_the_answer_is_right_or_an_error_that_names_the_cause(
    trials_over: Callable[[str], Trials], combination: Combination
) -> None:
    _, problem = trials_over(combination.transport).run(combination)
    assert not problem


def test_messages_are_cut_where_they_end() -> None:
    frame = framing.frame(b"xyz")
    assert [m for byte in frame + frame for m in ControlFrames()(bytes([byte]))] == []
    frames, requests = ControlFrames(), HttpRequests()
    assert [m for byte in frame + frame for m in frames(bytes([byte]))] == [frame, frame]
    get, post = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    assert [m for byte in get + post + get for m in requests(bytes([byte]))] == [get, post, get]
