"""A package whose docstring lists its modules lists all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "embferry"
UNLISTED = {"__init__", "__main__", "errors"}
"""Errors are listed in ``docs/errors.md``."""


def modules_of(package: Path) -> set[str]:
    return {file.stem for file in package.glob("*.py")} - UNLISTED


def listed_in(package: Path) -> set[str]:
    """Returns the names in a package's docstring that stand in backticks or begin a row of a list."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    return set(re.findall(r"(?<=`)\w+(?=`)|^\w+(?=  )", text, re.MULTILINE))


def maps() -> list[Path]:
    """Returns the packages whose docstring lists modules: more than half of three at least."""
    packages = sorted(file.parent for file in SOURCE.rglob("__init__.py"))
    return [p for p in packages if len(m := modules_of(p)) > 2 and 2 * len(m & listed_in(p)) > len(m)]


@pytest.mark.parametrize("package", maps(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_the_map_of_a_package_is_complete(package: Path) -> None:
    assert modules_of(package) - listed_in(package) == set()


def test_packages_have_maps() -> None:
    assert len(maps()) > 10
