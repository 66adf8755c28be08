"""The engines whose ways to split are compared, and what the comparison has to know of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from . import sglang, vllm
from .configurations import Configuration, Damage
from .scenarios import Scenario
from .stack import Stack


class Engine(msgspec.Struct, frozen=True):
    name: str
    """Also of its package."""
    title: str
    configurations: tuple[Configuration, ...]
    """The first is the undivided engine, which has the right answers."""
    scenarios: tuple[Scenario, ...]
    nothing_to_damage: Mapping[tuple[Damage, str], str]
    """Why a configuration, by its name, takes no part in scenarios with a damage."""
    stack: type[Stack]
    facts: Callable[[bool], dict[str, str]]
    """Returns facts for the report; its argument says whether processes poll."""

    @property
    def undivided(self) -> Configuration:
        return self.configurations[0]

    def skipped(self, scenario: Scenario, configuration: Configuration) -> str:
        """Returns why the configuration does not take part; empty if it does."""
        return self.nothing_to_damage.get((scenario.damage, configuration.name), "")


VLLM = Engine("vllm", "vLLM", vllm.CONFIGURATIONS, vllm.SCENARIOS, vllm.NOTHING_TO_DAMAGE, vllm.VllmStack, vllm.facts)
SGLANG = Engine(
    "sglang",
    "SGLang",
    sglang.CONFIGURATIONS,
    sglang.SCENARIOS,
    sglang.NOTHING_TO_DAMAGE,
    sglang.SglangStack,
    sglang.facts,
)
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG)}
