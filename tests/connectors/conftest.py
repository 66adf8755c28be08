from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from .routed import Routed


@pytest.fixture
def make_routed() -> Iterator[Callable[..., Routed]]:
    with ExitStack() as stack:

        def make(**options: Any) -> Routed:
            return stack.enter_context(closing(Routed(**options)))

        yield make


@pytest.fixture(params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make(runner: str) -> Iterator[Callable[..., Any]]:
    from .runners import Side  # brings torch with it

    made: list[Side] = []

    def new(role: str, ranks: int = 1, **extra: Any) -> Any:
        made.append(Side(runner, role, ranks, **extra))
        return made[-1]

    yield new
    for side in made:
        side.close()
