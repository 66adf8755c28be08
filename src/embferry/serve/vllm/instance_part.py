"""A module of vLLM that this process, an instance's server, is about to change."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType

log = logging.getLogger(__name__)


def part_of_vllm(name: str, danger: str) -> ModuleType | None:
    """Returns a module of vLLM. Without vLLM, or without that module, logs it and returns None.

    Args:
        name: of the module.
        danger: what may happen without the change, for the log.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        if importlib.util.find_spec("vllm") is not None:
            log.warning("this vLLM has no %s: %s", name, danger)
        return None
