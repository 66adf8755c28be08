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
