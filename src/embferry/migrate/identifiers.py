"""What becomes of each identifier of a Python file that has to do with the system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import libcst as cst
from libcst.metadata import Assignment, FunctionScope, ImportAssignment

from .evidence import Origins
from .renames import METHOD, METHOD_KEYWORDS, NAMES, OWN_KEYS, PLAIN, ROOT_WORD
from .words import compound

Edits = dict[cst.CSTNode, str]
"""A node of the tree to the source text that it gets."""
Note = Callable[[cst.CSTNode, str], None]

NOT_YOURS = "{name} is another library's here; left alone"
YOUR_KEY = "{name} is a key or a placeholder of your own here; left alone"
YOUR_NAME = "{name} may be used from other files; rename it yourself if it belongs to the system"
TAKEN = "{name} is left alone in this file: {new} is bound beside it already"


class Identifiers:
    """Decides about names one by one; :attr:`edits` and :attr:`left` are complete when all have been seen."""

    def __init__(self, origins: Origins, note: Note) -> None:
        self._origins = origins
        self._note = note
        self.edits: Edits = {}
        self.left: Counter[str] = Counter()
        """Table names with a use that is another library's."""
        self.taken: dict[str, tuple[cst.Name, str]] = {}
        """Names whose new form is bound beside them: where, and what it is."""

    def see(self, node: cst.Name) -> None:
        name = node.value
        if name not in NAMES and name not in METHOD_KEYWORDS and ROOT_WORD not in name.lower():
            return
        match self._origins.parents.get(node):
            case cst.Attribute(attr=attr, value=value) if attr is node:
                self._attribute(node, value)
            case cst.Arg(keyword=keyword) as arg if keyword is node:
                self._keyword(node, arg)
            case cst.ImportAlias() | cst.ImportFrom():
                self._imported(node)
            case _:
                self._name(node)

    def finish(self) -> None:
        """Takes back what would make one name of two."""
        for name, (node, new) in self.taken.items():
            self.left[name] += 1
            self._note(node, TAKEN.format(name=name, new=new))
        self.edits = {node: new for node, new in self.edits.items() if _spelled(node) not in self.taken}

    def _attribute(self, node: cst.Name, base: cst.BaseExpression) -> None:
        name = node.value
        if name in NAMES:
            self._rename(node, NAMES[name], foreign=self._origins.foreign(base, follow=name in PLAIN))
        elif name.startswith("_") and (new := compound(name)):
            self._rename(node, new, foreign=self._origins.foreign(base, follow=False))
        elif compound(name):
            self._note(node, YOUR_NAME.format(name=name))

    def _keyword(self, node: cst.Name, arg: cst.Arg) -> None:
        call = self._origins.parents.get(arg)
        if not isinstance(call, cst.Call):
            return
        callee = last_name(call.func)
        if NAMES.get(callee, callee) == METHOD and node.value in METHOD_KEYWORDS:
            self._rename(node, METHOD_KEYWORDS[node.value], foreign=False)
        elif node.value in NAMES and callee in OWN_KEYS:
            self.left[node.value] += 1
            self._note(node, YOUR_KEY.format(name=node.value))
        elif node.value in NAMES:
            self._rename(node, NAMES[node.value], foreign=self._origins.foreign(call.func, follow=node.value in PLAIN))
        elif compound(node.value):
            self._note(node, YOUR_NAME.format(name=node.value))

    def _imported(self, node: cst.Name) -> None:
        """A name that is imported is renamed where it is defined, or not at all: other libraries keep theirs."""
        self.left[node.value] += 1
        self._note(node, YOUR_NAME.format(name=node.value))

    def _name(self, node: cst.Name) -> None:
        name, bindings = node.value, self._origins.assignments(node)
        if any(isinstance(binding, ImportAssignment) for binding in bindings):
            self.left[name] += 1  # noted at the import
        elif name in NAMES:
            self._rename(node, NAMES[name], foreign=self._origins.foreign(node, follow=name in PLAIN))
        elif new := compound(name):
            local = bool(bindings) and all(
                _is_local(binding) for binding in bindings if isinstance(binding, Assignment)
            )
            if local or (name.startswith("_") and not name.startswith("__")):
                self._rename(node, new, foreign=False)
            else:
                self._note(node, YOUR_NAME.format(name=name))

    def _rename(self, node: cst.Name, new: str, foreign: bool) -> None:
        if foreign:
            self.left[node.value] += 1
            self._note(node, NOT_YOURS.format(name=node.value))
            return
        if self._origins.assignments(node, spelled=new):
            self.taken.setdefault(node.value, (node, new))
        self.edits[node] = new


def last_name(node: cst.BaseExpression) -> str:
    """``c`` of ``a.b.c`` and of ``c``; empty for anything else."""
    match node:
        case cst.Attribute(attr=attr):
            return attr.value
        case cst.Name(value=name):
            return name
    return ""


def _is_local(binding: Assignment) -> bool:
    """Whether nobody outside the function can know the name: parameters are known to callers."""
    return isinstance(binding.scope, FunctionScope) and not isinstance(binding.node, cst.Param)


def _spelled(node: cst.CSTNode) -> str:
    return node.value if isinstance(node, cst.Name) else ""
