"""The codemod for one Python file: it renames what is the system's and lists the places that are doubtful."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Set
from pathlib import PurePath

import libcst as cst
from libcst.metadata import (
    Assignment,
    BaseAssignment,
    BuiltinAssignment,
    FunctionScope,
    ImportAssignment,
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    ScopeProvider,
)

from . import words
from .words import GENERIC, NAMES, SYSTEM, RewriteError, mentions, replace_names, replace_phrases

_USES_THE_SYSTEM = re.compile(
    rf"{SYSTEM}|^[ \t]*(?:from|import(?:[ \t][\w., ]*,)?)[ \t]+(?:embferry\b|sglang[\w.]*\.disaggregation\b)",
    re.MULTILINE,
)
_NEUTRAL = frozenset({"", "embferry", "sglang", "torch", "numpy"}) | sys.stdlib_module_names
"""Packages whose values may be the system's, too. A relative import has the empty name."""

_METHODS = frozenset({"init_continuation", "resume_transfer"})
_METHOD_KEYWORDS = {"received_tokens": "sent_tokens", "continuation_offset": "sent_tokens"}
_TAKE_A_NAME = frozenset({"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "object"})
_FILL_KEYS = frozenset({"dict", "format", "format_map", "substitute", "safe_substitute"})
_SEARCH = words.split("search match fullmatch findall finditer compile sub split count find startswith endswith")
_SAY = words.split("debug info warning warn error exception critical log print fail echo write")
_TARGETS = (cst.Name, cst.AssignTarget, cst.AsName, cst.Element, cst.StarredElement, cst.Tuple, cst.List)
_MAX_STEPS = 5
"""Assignments that are followed to find where a value comes from."""

ELSEWHERE = "old names, but nothing in this file uses the system (--assume rewrites it all the same)"
FOREIGN = "{} is another library's here; left alone"
OWN_KEY = "{} is a key of your own here; left alone"
OWN_TEXT = "a text with an old word; left alone"
PUBLIC = "{} may be used from other files; rename it yourself if it belongs to the system"
CLASH = "{} is left alone in this file: its new form is bound beside it already"


def rewrite(data: bytes, path: PurePath, own: Set[str] = frozenset(), assume: bool = False) -> words.Rewritten:
    """Returns the file with the present names.

    Args:
        data: The contents of the file.
        path: The path of the file; it may show that the file is one of the system's.
        own: Top-level names of the user's modules: an import from them is not another library's.
        assume: Treat the file as one that uses the system.

    Raises:
        RewriteError: The file cannot be read as Python, or would not be written back byte for byte.
    """
    module = _parse(data)
    its_own = path.stem in words.MODULES or "disaggregation" in path.parts[:-1]
    if not (assume or its_own or _USES_THE_SYSTEM.search(module.code)):
        return words.Rewritten(data, ((0, ELSEWHERE),), module.encoding)
    try:
        wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
        first = _Codemod(own)
        wrapper.visit(first)
        # What the first pass found out about a name holds for the whole file, also for lines before.
        final = _Codemod(own, first.clashing, first.left | first.clashing)
        changed = wrapper.visit(final)
        return words.Rewritten(changed.bytes, tuple(sorted(set(final.doubtful))), module.encoding)
    except RecursionError:
        raise RewriteError("not read: it is nested too deep") from None


def _parse(data: bytes) -> cst.Module:
    try:
        # The interpreter reports code that is nested too deep; libcst's parser would overflow its stack.
        with warnings.catch_warnings(action="ignore"):
            ast.parse(data)
        module = cst.parse_module(data)
        same = module.bytes == data
    except cst.ParserSyntaxError as error:
        raise RewriteError(f"not read: line {error.raw_line}: {error.message}") from None
    except (cst.CSTValidationError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as error:
        raise RewriteError(f"not read: {type(error).__name__}: {error}".splitlines()[0]) from None
    if not same:
        raise RewriteError("not read: it would not be written back as it was")
    return module


class _Codemod(cst.CSTTransformer):
    """Renames in one file. Keeps ``clashing`` names everywhere, and those of ``keep_in_text`` in comments and messages.

    Attributes:
        doubtful: (line, reason) of what a person has to look at.
        clashing: Names whose new form is bound beside them already.
        left: Names with a use that was left alone.
    """

    METADATA_DEPENDENCIES = (ParentNodeProvider, PositionProvider, ScopeProvider)

    def __init__(self, own: Set[str], clashing: Set[str] = frozenset(), keep_in_text: Set[str] = frozenset()) -> None:
        super().__init__()
        self._ours = own | _NEUTRAL
        self._keep_in_text = keep_in_text
        self.clashing = set(clashing)
        self.left: set[str] = set()
        self.doubtful: list[tuple[int, str]] = []

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:  # type: ignore[override]
        match original_node:
            case cst.Name():
                new = self._identifier(original_node)
            case cst.SimpleString(raw_value=old, prefix=prefix, quote=quote) if mentions(old):
                new = prefix + quote + self._string(original_node, old) + quote
            case cst.FormattedStringText(value=old) if mentions(old):
                new = self._message(original_node, old)
            case cst.Comment(value=old):
                new = replace_names(replace_phrases(old), self._keep_in_text)
            case _:
                return updated_node
        return updated_node.with_changes(value=new)

    # Identifiers

    def _identifier(self, node: cst.Name) -> str:
        name = node.value
        if name not in _METHOD_KEYWORDS and not mentions(name):
            return name
        parent, new = self._parent(node), NAMES.get(name)
        owner: cst.BaseExpression = node
        match parent:
            case cst.Attribute(attr=attr, value=value) if attr is node:
                owner = value
            case cst.Arg(keyword=keyword) if keyword is node and isinstance(call := self._parent(parent), cst.Call):
                owner = call.func
                if _last_name(owner) in _METHODS and name in _METHOD_KEYWORDS:
                    return _METHOD_KEYWORDS[name]
                if new and _last_name(owner) in _FILL_KEYS:
                    return self._leave(node, name, OWN_KEY)
            case cst.ImportAlias() if self._is_foreign_import(parent):
                return self._leave(node, name, FOREIGN)
        if new is None:
            if (new := words.compound(name)) is None:
                return name
            if not (name.startswith("_") or (owner is node and self._is_local(node))):
                return self._leave(node, name, PUBLIC)
        if name in self.clashing:
            return self._leave(node, name, CLASH)
        if self._is_foreign(owner, _MAX_STEPS if name in GENERIC else 0):
            return self._leave(node, name, FOREIGN)
        if owner is node and self._bindings(node, new):
            self.clashing.add(name)
        return new

    def _leave(self, node: cst.CSTNode, old: str, reason: str) -> str:
        self.left.add(old)
        self._doubt(node, reason.format(old))
        return old

    def _doubt(self, node: cst.CSTNode, reason: str) -> None:
        self.doubtful.append((self.get_metadata(PositionProvider, node).start.line, reason))

    def _parent(self, node: cst.CSTNode) -> cst.CSTNode:
        return self.get_metadata(ParentNodeProvider, node)

    def _bindings(self, node: cst.Name, name: str) -> list[BaseAssignment]:
        """Returns what binds ``name`` in the scope of ``node``, without builtins."""
        scope = self.get_metadata(ScopeProvider, node, None)
        return [found for found in scope[name] if not isinstance(found, BuiltinAssignment)] if scope else []

    def _is_local(self, node: cst.Name) -> bool:
        """Returns whether the name is known inside a function only; a parameter is known to callers."""
        found = self._bindings(node, node.value)
        return bool(found) and all(
            isinstance(binding.scope, FunctionScope)
            and not (isinstance(binding, Assignment) and isinstance(binding.node, cst.Param))
            and not isinstance(binding, ImportAssignment)
            for binding in found
        )

    # Where values come from

    def _is_foreign(self, value: cst.BaseExpression, steps: int) -> bool:
        """Returns whether the value starts at another library's import, seen through at most ``steps`` assignments."""
        root = _root(value)
        found = self._bindings(root, root.value) if root else []
        return bool(found) and all(self._binds_foreign(binding, steps) for binding in found)

    def _binds_foreign(self, binding: BaseAssignment, steps: int) -> bool:
        if isinstance(binding, ImportAssignment):
            names = binding.get_qualified_names_for(binding.name)
            return bool(names) and self._ours.isdisjoint(name.name.partition(".")[0] for name in names)
        value = self._assigned(binding.node) if steps and isinstance(binding, Assignment) else None
        return value is not None and self._is_foreign(value, steps - 1)

    def _is_foreign_import(self, alias: cst.ImportAlias) -> bool:
        statement = self._parent(alias)
        if not isinstance(statement, cst.ImportFrom) or statement.relative or statement.module is None:
            return False
        root = _root(statement.module)
        return root is not None and root.value not in self._ours

    def _assigned(self, target: cst.CSTNode) -> cst.BaseExpression | None:
        """Returns the value, or else the annotation, that an assignment gives to its target."""
        while isinstance(target, _TARGETS):
            target = self._parent(target)
        match target:
            case cst.Assign(value=value) | cst.NamedExpr(value=value) | cst.WithItem(item=value):
                return value
            case cst.For(iter=value) | cst.CompFor(iter=value):
                return value
            case cst.AnnAssign(annotation=annotation, value=value):
                return value or annotation.annotation
            case cst.Param(annotation=cst.Annotation(annotation=value)):
                return value
        return None

    # Strings

    def _string(self, node: cst.SimpleString, old: str) -> str:
        if old in NAMES:
            owner = self._named_of(node)
            if old in self.clashing:
                return self._leave(node, old, CLASH)
            if owner is not None and self._is_foreign(owner, _MAX_STEPS if old in GENERIC else 0):
                return self._leave(node, old, FOREIGN)
            is_name = owner is not None or old not in GENERIC or self._is_slot(node)
            return NAMES[old] if is_name else self._leave(node, old, OWN_KEY)
        if old == words.ROOT and self._is_searched_for(node):
            return words.NEW_ROOT
        if " " not in old and re.search(SYSTEM, old):
            return replace_names(old, self._keep_in_text)  # a dotted path, as mock.patch takes it
        return self._message(node, old)

    def _message(self, node: cst.CSTNode, old: str) -> str:
        new = replace_phrases(old)
        if self._is_message(node):
            new = replace_names(new, self._keep_in_text)
        if mentions(new):
            self._doubt(node, OWN_TEXT)
        return new

    def _is_message(self, node: cst.CSTNode) -> bool:
        """Returns whether the string is a docstring or part of a log line or an error."""
        while not isinstance(node := self._parent(node), cst.BaseSmallStatement | cst.BaseStatement):
            if isinstance(node, cst.Call) and _last_name(node.func) in _SAY:
                return True
        return isinstance(node, cst.Raise | cst.Assert) or (
            isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)
        )

    def _is_searched_for(self, node: cst.SimpleString) -> bool:
        """Returns whether the string is the left side of ``in``, or the pattern of a search."""
        match self._parent(node):
            case cst.Comparison(left=left, comparisons=[cst.ComparisonTarget(operator=cst.In() | cst.NotIn())]):
                return left is node
            case cst.Arg() as arg:
                call = self._parent(arg)
                return isinstance(call, cst.Call) and call.args[0] is arg and _last_name(call.func) in _SEARCH
        return False

    def _named_of(self, node: cst.SimpleString) -> cst.BaseExpression | None:
        """Returns ``x`` for a string in ``getattr(x, "…")``, ``vars(x)["…"]`` or ``x(**{"…": y})``."""
        parent = self._parent(node)
        match parent, self._parent(parent):
            case cst.Arg(), cst.Call() as call if _last_name(call.func) in _TAKE_A_NAME:
                return call.args[0].value
            case cst.Index(), element:
                match self._parent(element):
                    case cst.Subscript(value=cst.Call(func=func, args=[cst.Arg(value=value), *_])):
                        return value if _last_name(func) in ("vars", "asdict") else None
                    case cst.Subscript(value=cst.Attribute(attr=cst.Name(value="__dict__"), value=value)):
                        return value
            case cst.DictElement(), spread:
                arg = self._parent(spread)
                if isinstance(arg, cst.Arg) and arg.star and isinstance(called := self._parent(arg), cst.Call):
                    return called.func
        return None

    def _is_slot(self, node: cst.CSTNode) -> bool:
        while isinstance(node := self._parent(node), cst.Element | cst.Tuple | cst.List):
            pass
        targets = [_last_name(target.target) for target in node.targets] if isinstance(node, cst.Assign) else []
        return not {"__slots__", "__match_args__", "__all__"}.isdisjoint(targets)


def _last_name(node: cst.BaseExpression) -> str:
    """Returns ``c`` of ``a.b.c`` and of ``c``; the empty string for anything else."""
    match node:
        case cst.Attribute(attr=cst.Name(value=name)) | cst.Name(value=name):
            return name
    return ""


def _root(node: cst.BaseExpression) -> cst.Name | None:
    """Returns the name that an expression of attributes, calls and subscripts starts with."""
    while not isinstance(node, cst.Name):
        match node:
            case (
                cst.Attribute(value=node) | cst.Subscript(value=node) | cst.Call(func=node) | cst.Await(expression=node)
            ):
                pass
            case _:
                return None
    return node
