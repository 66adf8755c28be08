"""Reads a Dockerfile: its stages and their steps, with the build arguments in their places."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_EXPANDED = ("FROM", "COPY", "ENV", "USER", "WORKDIR", "EXPOSE")
_FLAG = re.compile(r"^--(\w[\w-]*)=(\S+)\s+")


@dataclass
class Step:
    """One instruction: its keyword in capitals, its flags, and the rest."""

    keyword: str
    flags: dict[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the form in JSON, or of the other one."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass
class Stage:
    """One stage: its name, what it begins with, and its steps.

    Attributes:
        base: The image or the stage before.
        arguments: The build arguments that its steps see.
        environ: The environment of its steps and of its containers.
    """

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def last(self, keyword: str) -> Step | None:
        """Returns the last step with a keyword, which is the one that counts."""
        return next((step for step in reversed(self.steps) if step.keyword == keyword), None)


def stages(text: str, given: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, Stage]:
    """Returns the stages of a Dockerfile by name, in their order.

    Args:
        text: Of the file.
        given: Build arguments, as with ``--build-arg``.
        inherited: The environment that images bring.
    """
    found: dict[str, Stage] = {}
    stage = Stage("", "")
    global_arguments: dict[str, str] = {}
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines():
        if not line.strip():
            continue
        keyword, _, rest = line.strip().partition(" ")
        known = {**stage.environ, **stage.arguments} if stage.name else global_arguments
        if keyword == "FROM":
            known = global_arguments
        rest = _expanded(rest.strip(), known) if keyword in _EXPANDED else rest.strip()
        flags = {}
        while match := _FLAG.match(rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            earlier = found.get(base)
            stage = Stage(name.strip(), base, environ=dict(earlier.environ if earlier else inherited))
            found[stage.name] = stage
        elif keyword == "ARG":
            name, _, default = rest.partition("=")
            arguments = stage.arguments if stage.name else global_arguments
            arguments[name] = given.get(name, default or global_arguments.get(name, ""))
        else:
            if keyword == "ENV":
                stage.environ |= dict(word.split("=", 1) for word in shlex.split(rest))
            stage.steps.append(Step(keyword, flags, rest))
    return found


def _expanded(text: str, known: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: known.get(match[1] or match[2], ""), text)
