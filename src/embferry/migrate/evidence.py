"""Whether a Python file has to do with the system, and whether a value in it is another library's."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import PurePath

import libcst as cst
from libcst.metadata import Assignment, BaseAssignment, BuiltinAssignment, ImportAssignment, Scope

from .renames import CLASSES, MODULES, NEUTRAL, PACKAGES

MAX_STEPS = 5
"""How many assignments a value is followed back."""

_IN_A_STRING = re.compile(rf"\b(?:{'|'.join(sorted(MODULES | CLASSES))})\b")


def belongs(module: cst.Module, path: PurePath) -> bool:
    """Whether the file is one of the system's, imports it or uses one of its classes."""
    if path.stem in MODULES or ("disaggregation" in path.parts[:-1] and path.suffix == ".py"):
        return True
    looks = _Looks()
    module.visit(looks)
    return looks.found


class _Looks(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        self.found = self.found or _uses_the_system(node)
        return not self.found


def _uses_the_system(node: cst.CSTNode) -> bool:
    match node:
        case cst.Import(names=names):
            return any(_is_the_system(dotted(alias.name)) for alias in names)
        case cst.ImportFrom(module=module, relative=relative, names=names):
            aliases = [] if isinstance(names, cst.ImportStar) else names
            named = any(dotted(alias.name) in MODULES for alias in aliases)
            # A relative import's first word is no package.
            return named or _is_the_system(dotted(module) if module else "", inside=bool(relative))
        case cst.Name(value=name):
            return name in CLASSES
        case cst.SimpleString(value=text):
            return " " not in text and bool(_IN_A_STRING.search(text))
    return False


def _is_the_system(module: str, inside: bool = False) -> bool:
    parts = module.split(".")
    if not MODULES.isdisjoint(parts):
        return True
    return not inside and parts[0] in PACKAGES and ("disaggregation" in parts or parts[0] == "embferry")


def dotted(node: cst.BaseExpression) -> str:
    """``a.b.c`` of a chain of attributes; empty for anything else."""
    if isinstance(node, cst.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr.value}" if before else ""
    return node.value if isinstance(node, cst.Name) else ""


def root_of(node: cst.CSTNode) -> cst.Name | None:
    """The name that an expression of attributes, calls and subscripts starts with."""
    while True:
        match node:
            case cst.Name():
                return node
            case cst.Attribute(value=inner) | cst.Subscript(value=inner) | cst.Call(func=inner):
                node = inner
            case cst.Await(expression=inner) | cst.Annotation(annotation=inner):
                node = inner
            case _:
                return None


class Origins:
    """Where the names of one file come from.

    :param own: top-level names of the user's modules; an import from them is not another library's.
    """

    def __init__(
        self,
        scopes: Mapping[cst.CSTNode, Scope | None],
        parents: Mapping[cst.CSTNode, cst.CSTNode],
        own: frozenset[str],
    ) -> None:
        self.scopes = scopes
        self.parents = parents
        self._ours = own | NEUTRAL | sys.stdlib_module_names | {""}

    def foreign(self, node: cst.CSTNode, follow: bool, steps: int = MAX_STEPS) -> bool:
        """Whether the value starts from another library's import; with ``follow``, also through assignments."""
        root = root_of(node)
        found = self.assignments(root) if root is not None else ()
        return bool(found) and all(self._is_foreign(assignment, follow, steps) for assignment in found)

    def assignments(self, name: cst.Name, spelled: str | None = None) -> tuple[BaseAssignment, ...]:
        """What binds the name (or, in the same place, another spelling), builtins left out."""
        scope = self.scopes.get(name)
        if scope is None:
            return ()
        found = scope[spelled or name.value]
        return tuple(binding for binding in found if not isinstance(binding, BuiltinAssignment))

    def _is_foreign(self, binding: BaseAssignment, follow: bool, steps: int) -> bool:
        if isinstance(binding, ImportAssignment):
            # A relative import has an empty first part.
            packages = {found.name.partition(".")[0] for found in binding.get_qualified_names_for(binding.name)}
            return bool(packages) and packages.isdisjoint(self._ours)
        if not follow or steps <= 0 or not isinstance(binding, Assignment):
            return False
        value = self._value(binding.node)
        return value is not None and self.foreign(value, follow, steps - 1)

    def _value(self, target: cst.CSTNode) -> cst.CSTNode | None:
        """What is assigned to a target, as far as it says where it comes from."""
        node: cst.CSTNode | None = target
        while isinstance(node, _TARGETS):
            node = self.parents.get(node)
        match node:
            case cst.Assign(value=value) | cst.NamedExpr(value=value):
                return value
            case cst.AnnAssign(value=value, annotation=annotation):
                return value or annotation
            case cst.WithItem(item=value) | cst.For(iter=value) | cst.CompFor(iter=value):
                return value
            case cst.Param(annotation=annotation):
                return annotation
        return None


_TARGETS = (cst.Name, cst.AssignTarget, cst.AsName, cst.Element, cst.StarredElement, cst.Tuple, cst.List)
