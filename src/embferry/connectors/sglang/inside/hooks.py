"""Puts the plug-in's functions and classes in the place of SGLang's, and proves that they are there."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ..process import end_process

SUPPORTED = ("0.5.23",)
"""Versions of SGLang that the plug-in was tested with. Its modules are no interface, and change often."""
ROOT = "sglang.srt."


class Hook(NamedTuple):
    """A function or class that takes the place of one of SGLang's.

    Attributes:
        module: Its module, without ``sglang.srt.``.
        name: Its name in the module.
        kind: How the two work together.
        ours: Ours.
        parameters: The names of its parameters, in order.
    """

    module: str
    name: str
    kind: HookType
    ours: Callable[..., Any]
    parameters: str

    @property
    def target(self) -> str:
        """The full name."""
        return f"{ROOT}{self.module}.{self.name}"

    def find(self) -> Any:
        """Returns what is at that place now. Raises AttributeError or ImportError if nothing is."""
        found: Any = importlib.import_module(ROOT + self.module)
        for name in self.name.split("."):
            found = getattr(found, name)
        return found


def install(hooks: Sequence[Hook]) -> None:
    """Registers the hooks, to be checked when SGLang has applied them. Ends the process if one does not fit."""
    found = version("sglang")
    if found not in SUPPORTED:
        works = ", ".join(SUPPORTED)
        end_process(f"the embferry plug-in works with SGLang {works}, not {found}; EMBFERRY_SGLANG=0 turns it off")
    originals = [original(hook, found) for hook in hooks]
    for hook in hooks:
        HookRegistry.register(hook.target, hook.ours, hook.kind)
    apply_hooks = HookRegistry.apply_hooks

    def apply_and_check() -> None:
        apply_hooks()
        check(hooks, originals, found)

    HookRegistry.apply_hooks = apply_and_check


def original(hook: Hook, found: str) -> Any:
    """Returns SGLang's own, which has to have the parameters that ours was written for."""
    try:
        theirs = hook.find()
        parameters = ", ".join(inspect.signature(theirs).parameters)
    except (ImportError, AttributeError, ValueError) as error:
        end_process(f"the embferry plug-in does not fit SGLang {found}: {hook.target} is not there: {error}")
    if parameters != hook.parameters:
        end_process(
            f"the embferry plug-in does not fit SGLang {found}: {hook.target} has the parameters ({parameters}), "
            f"not ({hook.parameters})"
        )
    return theirs


def check(hooks: Sequence[Hook], originals: Sequence[Any], found: str) -> None:
    """Ends the process if SGLang has not put one of ours in its place: it would go on with its own transfers."""
    for hook, theirs in zip(hooks, originals, strict=True):
        is_ours = hook.find() is hook.ours if isinstance(hook.ours, type) else hook.find() is not theirs
        if not is_ours:
            end_process(f"the embferry plug-in is not in place: SGLang {found} has not replaced {hook.target}")
