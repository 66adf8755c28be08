"""What becomes of each string and comment of a Python file that has to do with the system."""

from __future__ import annotations

from collections.abc import Collection, Container

import libcst as cst

from .evidence import Origins, dotted
from .identifiers import NOT_YOURS, YOUR_KEY, Note, last_name
from .renames import (
    ATTRIBUTE_CALLS,
    CLASSES,
    MAPPING_VIEWS,
    MESSAGE_CALLS,
    MODULES,
    NAME_LISTS,
    NAMES,
    NEW_ROOT,
    PLACEHOLDER_CALLS,
    PLAIN,
    ROOT_WORD,
    SEARCH_CALLS,
)
from .words import names, phrases

_ERRORS = ("Error", "Exception", "Warning")


class Strings:
    """Decides about texts one by one.

    :param left: table names that stay in this file's code, for they are another library's; they stay in its text, too.
    :param taken: table names that cannot be renamed in this file.
    """

    def __init__(self, origins: Origins, note: Note, left: Collection[str], taken: Container[str]) -> None:
        self._origins = origins
        self._note = note
        self._left = set(left)
        self._taken = taken

    def comment(self, node: cst.Comment) -> str:
        return names(phrases(node.value), NAMES.keys() - self._left)

    def piece(self, node: cst.FormattedStringText) -> str:
        """A literal part of an f-string."""
        return self._message(node, node.value)

    def string(self, node: cst.SimpleString) -> str:
        inner = node.raw_value
        if inner in NAMES:
            new = NAMES[inner] if self._is_a_name(node, inner) else inner
        elif inner.lower() == ROOT_WORD:
            new = NEW_ROOT if inner == ROOT_WORD and self._is_searched_for(node) else inner
        elif " " not in inner and not {*MODULES, *CLASSES}.isdisjoint(inner.split(".")):
            new = names(inner, NAMES.keys() - self._left)  # a dotted path, as mock.patch takes it
        else:
            new = self._message(node, inner)
        if new == inner:
            return node.value
        start = len(node.prefix) + len(node.quote)
        return node.value[:start] + new + node.quote

    def _message(self, node: cst.CSTNode, text: str) -> str:
        new = phrases(text)
        return names(new, NAMES.keys() - self._left) if self._is_message(node) else new

    def _is_message(self, node: cst.CSTNode) -> bool:
        """Whether the string is said by a log, an error or a docstring."""
        parents = self._origins.parents
        node = parents[node]
        while True:
            match node:
                case cst.Expr() | cst.Raise() | cst.Assert():
                    return True
                case cst.Call(func=func):
                    callee = last_name(func)
                    if callee in MESSAGE_CALLS:
                        return True
                    if callee not in PLACEHOLDER_CALLS and not callee.endswith(_ERRORS):
                        return False
                case cst.Attribute(attr=attr) if attr.value in PLACEHOLDER_CALLS:
                    pass
                case cst.FormattedString() | cst.ConcatenatedString() | cst.BinaryOperation() | cst.Arg():
                    pass
                case _:
                    return False
            node = parents[node]

    def _is_searched_for(self, node: cst.SimpleString) -> bool:
        """``"…" in line``, ``re.search("…", line)``, ``line.startswith("…")``."""
        match self._origins.parents.get(node):
            case cst.Comparison(left=left, comparisons=[cst.ComparisonTarget(operator=cst.In() | cst.NotIn())]):
                return left is node
            case cst.Arg() as arg:
                call = self._origins.parents.get(arg)
                return isinstance(call, cst.Call) and call.args[0] is arg and last_name(call.func) in SEARCH_CALLS
        return False

    def _is_a_name(self, node: cst.SimpleString, name: str) -> bool:
        """Whether a string that equals a table name names the system's attribute."""
        if name in self._taken:
            return False
        base = self._named_of(node)
        if base is not None and self._origins.foreign(base, follow=name in PLAIN):
            return self._leave(node, name, NOT_YOURS)
        if base is not None or name not in PLAIN or self._is_listed(node):
            return True
        return self._leave(node, name, YOUR_KEY)

    def _leave(self, node: cst.SimpleString, name: str, why: str) -> bool:
        self._note(node, why.format(name=name))
        self._left.add(name)
        return False

    def _named_of(self, node: cst.SimpleString) -> cst.BaseExpression | None:
        """What the attribute is taken of: ``x`` in ``getattr(x, "…")``, ``vars(x)["…"]``, ``f(**{"…": y})``."""
        parents = self._origins.parents
        match parents.get(node):
            case cst.Arg() as arg:
                call = parents.get(arg)
                if isinstance(call, cst.Call) and last_name(call.func) in ATTRIBUTE_CALLS:
                    return call.args[0].value
            case cst.Index() as index:
                subscript = parents[parents[index]]
                return _viewed(subscript.value) if isinstance(subscript, cst.Subscript) else None
            case cst.DictElement() as element:
                spread = parents.get(parents[element])
                call = parents.get(spread) if isinstance(spread, cst.Arg) and spread.star == "**" else None
                return call.func if isinstance(call, cst.Call) else None
        return None

    def _is_listed(self, node: cst.SimpleString) -> bool:
        """In ``__slots__`` and the like."""
        parent: cst.CSTNode | None = self._origins.parents.get(node)
        while isinstance(parent, cst.Element | cst.Tuple | cst.List | cst.Set):
            parent = self._origins.parents.get(parent)
        targets = parent.targets if isinstance(parent, cst.Assign) else ()
        return any(dotted(target.target) in NAME_LISTS for target in targets if isinstance(target.target, cst.Name))


def _viewed(node: cst.BaseExpression) -> cst.BaseExpression | None:
    """``x`` of ``vars(x)``, ``asdict(x)`` and ``x.__dict__``."""
    match node:
        case cst.Call(func=func, args=[cst.Arg(value=value), *_]) if last_name(func) in MAPPING_VIEWS:
            return value
        case cst.Attribute(attr=cst.Name(value="__dict__"), value=value):
            return value
    return None
