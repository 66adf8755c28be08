"""The tables of locks in ``docs/structure.md`` name every lock of the source, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "embferry"
KINDS = {"Lock", "RLock", "Condition"}
NOT_LISTED = {"bench", "testing"}


def locks_of(node: ast.AST, owner: str = "") -> Iterator[str]:
    """Yields ``Class.attribute`` for each lock that an assignment makes; a module's own by its name alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from locks_of(child, f"{child.name}.")
        elif isinstance(child, ast.Assign | ast.AnnAssign) and child.value is not None and makes_a_lock(child.value):
            target = child.targets[0] if isinstance(child, ast.Assign) else child.target
            yield owner + (target.attr if isinstance(target, ast.Attribute) else ast.unparse(target))
        else:
            yield from locks_of(child, owner)


def makes_a_lock(value: ast.expr) -> bool:
    """Returns whether an expression makes a lock; a condition over a lock that exists makes none."""
    if isinstance(value, ast.Call) and name_of(value.func) == "field":
        return any(keyword.arg == "default_factory" and name_of(keyword.value) in KINDS for keyword in value.keywords)
    if not isinstance(value, ast.Call) or name_of(value.func) not in KINDS:
        return False
    return all(makes_a_lock(argument) for argument in value.args)


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_the_page_names_every_lock() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in NOT_LISTED]
    made = {lock for path in files for lock in locks_of(ast.parse(path.read_text()))}
    page = (ROOT / "docs" / "structure.md").read_text()
    _, _, section = page.partition("\n## Locks\n")
    tables = section.partition("\n**Order.**")[0]
    firsts = re.findall(r"^\|([^|]*)\|", tables, re.MULTILINE)
    named = {name for first in firsts for name in re.findall(r"`(\w+\.\w+|_\w+)`", first)}
    assert "Manager.lock" in made
    assert named == made
