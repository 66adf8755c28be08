"""Input of the engine, which ends a wait of its scheduler. The engine is found among the callers."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest

from embferry.connectors.vllm.engine_input import has_input


class Connector:
    def __init__(self) -> None:
        self.has_input = has_input()


class Engine:
    """As vLLM's: the queue is there before the scheduler, which makes the connector."""

    def __init__(self, made: Callable[[], Connector]) -> None:
        self.input_queue = queue.Queue[int]()
        self.connector = made()


class WithoutQueue:
    def __init__(self) -> None:
        self.connector = Connector()


def test_it_is_seen_whether_something_waits_for_the_engine() -> None:
    engine = Engine(lambda: WithoutQueue().connector)
    found = engine.connector.has_input
    assert found is not None
    assert not found()
    engine.input_queue.put(1)
    assert found()
    engine.input_queue.get()
    assert not found()


@pytest.mark.parametrize("value", [None, 5, object()])
def test_an_engine_of_another_form_is_not_used(value: object) -> None:
    class Other:
        def __init__(self) -> None:
            self.input_queue = value
            self.connector = Connector()

    assert Other().connector.has_input is None
    assert WithoutQueue().connector.has_input is None
