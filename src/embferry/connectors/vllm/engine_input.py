"""Input that the engine of vLLM has not read yet. It ends a wait of the scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType

_ATTRIBUTE = "input_queue"
"""Attribute of vLLM's ``EngineCoreProc``: a queue that another thread fills with requests, aborts and calls."""


def has_input() -> Callable[[], bool] | None:
    """Returns a function that says whether something waits for the engine.

    The engine makes its scheduler, and that the connector. So this is called while the engine is made, and looks for
    it among the callers. Nothing of it is changed.

    Returns:
        None if there is no such engine, as where vLLM runs in the process of its caller.
    """
    frame: FrameType | None = inspect.currentframe()
    try:
        while frame is not None:
            found = getattr(frame.f_locals.get("self"), _ATTRIBUTE, None)
            if callable(empty := getattr(found, "empty", None)):
                return lambda: not empty()
            frame = frame.f_back
        return None
    finally:
        del frame
