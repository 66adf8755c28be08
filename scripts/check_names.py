"""The origin's verification checklist as a program: are its names where its users look for them?

    python scripts/check_names.py [root]

Prints every check with its outcome; ends with 1 if one is MISSING. What must be there: ``scripts/required_names.py``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import required_names as required

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/embferry"
TEXTS = ("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "Makefile")
SEARCHED = ("src", "tests", "training", "examples", "docs", ".github")
SPELLED_OUT = ("required_names.py", "test_check_names.py")  # they have to name the old words

Check = tuple[str, bool]


def main(root: Path) -> int:
    """Prints the checks of the tree at ``root``; answers the exit status."""
    checks = list(all_checks(root))
    for what, holds in checks:
        print(f"{'ok     ' if holds else 'MISSING'}  {what}")
    missing = sum(not holds for _, holds in checks)
    print(f"names: {len(checks)} checked, {missing} missing")
    return 1 if missing else 0


def all_checks(root: Path) -> Iterator[Check]:
    """(what, whether it holds) for every required name of the tree at ``root``."""
    package = root / PACKAGE
    yield from importable(package)
    yield from members(package)
    yield from methods(package)
    texts = "\n".join(path.read_text() for path in sorted(package.rglob("*.py")))
    yield from ((f"the word {word}", word in texts) for word in required.WORDS)
    yield from phrases(package)
    yield from old_words(root)


def importable(package: Path) -> Iterator[Check]:
    for file, names in required.IMPORTABLE.items():
        yield from ((f"{file}: {name}", find(package / file, name) is not None) for name in names)


def members(package: Path) -> Iterator[Check]:
    for (file, name), fields in required.FIELDS.items():
        found = find(package / file, name)
        yield f"{file}: {name}({', '.join(f for f, _ in fields)})", found is not None and annotated(found) == fields
    for (file, name), attributes in required.ATTRIBUTES.items():
        found = find(package / file, name)
        has = attributes_of(found) if found else set()
        yield from ((f"{file}: {name}.{attribute}", attribute in has) for attribute in attributes)
    for (file, name), values in required.STATUSES.items():
        found = find(package / file, name)
        yield f"{file}: {name} is {values}", found is not None and assigned(found) == values


def methods(package: Path) -> Iterator[Check]:
    for (file, name), wanted in required.METHODS.items():
        has_methods = inherited(package / file, name)
        for method, parameters in wanted.items():
            has = has_methods.get(method)
            shown = "(…)" if parameters is None else f"({', '.join(f'{p}={d}' if d else p for p, d in parameters)})"
            yield f"{file}: {name}.{method}{shown}", has is not None and parameters in (None, has)


def phrases(package: Path) -> Iterator[Check]:
    """Yields the checks of the log phrases of either wire."""
    origin = set((package / required.ORIGIN_WIRE).rglob("*.py"))
    for wire, paths in (("our wire", set(package.rglob("*.py")) - origin), ("the origin's wire", origin)):
        texts = "\n".join(path.read_text() for path in sorted(paths))
        flat = re.sub(r'"\s*\n?\s*f?"', "", texts)  # a phrase may be a string literal broken over two lines
        yield from ((f'the log of {wire} says "{phrase}"', phrase in flat) for phrase in required.PHRASES)


def old_words(root: Path) -> Iterator[Check]:
    for word in required.OLD_WORDS:
        where = [str(path.relative_to(root)) for path in searched(root) if word in path.read_text().lower()]
        yield f'the old word "{word}" is nowhere' + (f", but in {', '.join(where)}" if where else ""), not where


def searched(root: Path) -> Iterator[Path]:
    folders = [root / name for name in SEARCHED if (root / name).is_dir()]
    paths = [path for folder in folders for pattern in TEXTS for path in folder.rglob(pattern)]
    paths += [path for pattern in TEXTS for path in root.glob(pattern)]
    for path in paths:
        if "migrat" not in str(path.relative_to(root)).lower() and path.name not in SPELLED_OUT:
            yield path


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text() if path.is_file() else "")


def find(path: Path, name: str) -> ast.ClassDef | None:
    """Returns the class that ``from <path> import <name>`` imports."""
    found = locate(path, name)
    return found[1] if found else None


def inherited(path: Path, name: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Returns the signatures of the methods of a class and of its base classes in this project."""
    found = locate(path, name)
    if found is None:
        return {}
    where, node = found
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    merged: dict[str, tuple[tuple[str, str], ...]] = {}
    for base in reversed([base for base in bases if isinstance(base, ast.Name)]):
        merged |= inherited(where, base.id)
    return merged | signatures(node)


def locate(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """Returns the file and the class that ``from <path> import <name>`` imports, followed through imports."""
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("embferry.")):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return locate(source(path, node), alias.name)
    return None


def source(path: Path, node: ast.ImportFrom) -> Path:
    above = path.parents[node.level - 1] if node.level else ROOT / "src"
    base = above.joinpath(*(node.module or "").split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def annotated(node: ast.ClassDef) -> tuple[tuple[str, str], ...]:
    return tuple(
        (item.target.id, ast.unparse(item.value) if item.value else "")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


def assigned(node: ast.ClassDef) -> dict[str, str]:
    return {
        target.id: ast.unparse(item.value)
        for item in node.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }


def attributes_of(node: ast.ClassDef) -> set[str]:
    own = {name for name, _ in annotated(node)} | set(assigned(node)) | set(signatures(node))
    on_self = {
        item.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and ast.unparse(item.value) == "self"
    }
    return own | on_self


def signatures(node: ast.ClassDef) -> dict[str, tuple[tuple[str, str], ...]]:
    return {
        item.name: parameters_of(item.args)
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def parameters_of(arguments: ast.arguments) -> tuple[tuple[str, str], ...]:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults = [ast.unparse(default) for default in arguments.defaults]
    padded = [""] * (len(names) - len(defaults)) + defaults
    return tuple(zip(names, padded, strict=True))[1:]  # without self


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
