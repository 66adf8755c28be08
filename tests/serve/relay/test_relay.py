"""The fixed part of the table: every fault in every hop, in both directions, at one place."""

from __future__ import annotations

from collections.abc import Iterator
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
def trials(request: pytest.FixtureRequest, asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    with relayed_stack(request.param, tmp_path_factory.mktemp("relay") / "log") as stack:
        trials = Trials(stack, asked)
        trials.prepare()
        yield trials


def _cases() -> Iterator[Any]:
    for transport in HOPS:
        marks = [pytest.mark.engines] if transport in ENGINES else []
        for combination in combinations(transport, places=(0.3,)):
            yield pytest.param(transport, combination, marks=marks, id=str(combination))


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("trials", "combination"), [*_cases()], indirect=["trials"])
def test_the_answer_is_right_or_an_error_that_names_the_cause(trials: Trials, combination: Combination) -> None:
    _, problem = trials.run(combination)
    assert not problem


def test_messages_are_cut_where_they_end() -> None:
    frame = framing.frame(b"xyz")
    assert [m for byte in frame + frame for m in ControlFrames()(bytes([byte]))] == []
    frames, requests = ControlFrames(), HttpRequests()
    assert [m for byte in frame + frame for m in frames(bytes([byte]))] == [frame, frame]
    get, post = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    assert [m for byte in get + post + get for m in requests(bytes([byte]))] == [get, post, get]
