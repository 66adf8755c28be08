"""The codemod for one Python file: it renames what is certain by its name and lists the places that are doubtful."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Set
from pathlib import PurePath

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider

from . import words
from .words import GENERIC, NAMES, SYSTEM, Doubtful, RewriteError, mentions, replace_names, replace_phrases

_USES_THE_SYSTEM = re.compile(
    rf"{SYSTEM}|^[ \t]*(?:from|import(?:[ \t][\w., ]*,)?)[ \t]+(?:embferry\b|sglang[\w.]*\.disaggregation\b)",
    re.MULTILINE,
)
_NEUTRAL = frozenset({"embferry", "sglang", "torch", "numpy"}) | sys.stdlib_module_names
"""Packages whose values may be the system's, too."""

OLD_METHOD = "init_continuation"
OLD_PARAMETER = "embedding_index"
_OLD_PARAMETERS = (OLD_PARAMETER, "allocation", "sent_tokens")
_METHODS = frozenset({OLD_METHOD, "resume_transfer"})
_METHOD_KEYWORDS = {"received_tokens": "sent_tokens", "continuation_offset": "sent_tokens"}
_TAKE_A_NAME = words.split("getattr setattr hasattr delattr object")  # "object" is that of mock's patch.object
_FILL_KEYS = words.split("dict format format_map substitute safe_substitute")
_SAY = words.split("debug info warning warn error exception critical log print fail echo write")

ELSEWHERE = "old names, but nothing in this file uses the system (--assume rewrites it all the same)"
FOREIGN = "{} may be another library's here; left alone"
OWN_KEY = "{} is a key of your own here; left alone"
OWN_NAME = "{} is a name of your own; rename it yourself if it belongs to the system"
OWN_TEXT = "a text with an old word; left alone"
OLD_SIGNATURE = (
    f"{OLD_METHOD}({', '.join(_OLD_PARAMETERS)}) became resume_transfer(allocation, sent_tokens); pass keywords"
)
CLASH = "{} is left alone in this file; its new form would mean two things"


def rewrite(data: bytes, path: PurePath, own: Set[str] = frozenset(), assume: bool = False) -> tuple[bytes, Doubtful]:
    """Returns the file with the present names, and its doubtful places.

    Args:
        data: The contents of the file.
        path: The path of the file; it may show that the file is one of the system's.
        own: Top-level names of the user's modules: an import from them is not another library's.
        assume: Treat the file as one that uses the system.

    Raises:
        RewriteError: The file cannot be read as Python, or would not be written back byte for byte.
    """
    try:
        # The interpreter reports code that is nested too deep; libcst's parser would overflow its stack.
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(data)
        module = cst.parse_module(data)
        if module.bytes != data:
            raise RewriteError("not read: it would not be written back as it was")
        its_own = words.is_of_system(path)
        if not (assume or its_own or _USES_THE_SYSTEM.search(module.code)):
            return data, [(0, ELSEWHERE)]
        found = _Survey(tree, own | _NEUTRAL)
        wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
        first = _Codemod(found, found.clashing, its_own)
        wrapper.visit(first)
        # A name that is left alone somewhere stays in all texts, also in those before.
        final = _Codemod(found, first.left, its_own)
        changed = wrapper.visit(final)
    except cst.ParserSyntaxError as error:
        raise RewriteError(f"not read: line {error.raw_line}: {error.message}") from None
    except (cst.CSTValidationError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as error:
        raise RewriteError(f"not read: {type(error).__name__}: {error}".splitlines()[0]) from None
    return changed.bytes, sorted(set(final.doubtful))


class _Survey:
    """The names in a file whose values may be another library's, and the names that cannot be renamed.

    Scopes are ignored: a name that may be another library's in one function may be so in the whole file.

    Attributes:
        imported: Names imported from other libraries.
        foreign: These, and variables (``x``) and attributes (``.x``) that get their value from them.
        clashing: Old names that the file has beside their new form.
    """

    def __init__(self, tree: ast.AST, ours: Set[str]) -> None:
        self.foreign: set[str] = set()
        bound: set[object] = set()
        flows: list[tuple[set[str], set[str]]] = []  # from which names which names get their value
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names) | ast.ImportFrom(names=names, level=0):
                    module = getattr(node, "module", None)
                    for alias in names:
                        if (module or alias.name).partition(".")[0] not in ours:
                            self.foreign |= {alias.name.partition(".")[0], alias.asname or ""}
                case ast.Assign(targets=targets, value=value):
                    flows += [(_origins(value), _leaves(target)) for target in targets]
                case ast.AnnAssign(target=target, value=value, annotation=annotation):
                    flows.append((_words(annotation) | _origins(value), _leaves(target)))
                case (
                    ast.NamedExpr(target=target, value=value)
                    | ast.withitem(optional_vars=target, context_expr=value)
                    | (ast.For(target=target, iter=value) | ast.AsyncFor(target=target, iter=value))
                    | ast.comprehension(target=target, iter=value)
                ):
                    flows.append((_origins(value), _leaves(target)))
                case ast.arg(arg=name, annotation=ast.AST() as annotation):
                    flows.append((_words(annotation), {name}))
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.alias(name=name):
                    bound.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    bound.add(name)
                case ast.arg(arg=given) | ast.keyword(arg=given) | ast.Constant(value=str() as given):
                    bound.add(given)
        self.imported = frozenset(self.foreign)
        while fresh := [to - self.foreign for origins, to in flows if origins & self.foreign and to - self.foreign]:
            self.foreign.update(*fresh)
        self.clashing = {old for old, new in NAMES.items() if {old, new} <= bound}
        # The parameter of the method itself became sent_tokens, unlike the attribute.
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in _METHODS]
        parameters = [node for method in methods for node in ast.walk(method.args) if isinstance(node, ast.arg)]
        self.clashing |= {"received_tokens"} & {parameter.arg for parameter in parameters}


def _origins(node: ast.AST | None) -> set[str]:
    """Returns the names that a value may come from: all in it (``x``, ``.attribute``), except arguments and indices."""
    match node:
        case None:
            return set()
        case ast.Call(func=value) | ast.Subscript(value=value):
            return _origins(value)
        case ast.Name(id=name):
            return {name}
        case ast.Attribute(attr=name, value=value):
            return {f".{name}"} | _origins(value)
    return set().union(*map(_origins, ast.iter_child_nodes(node)))


def _leaves(target: ast.AST | None) -> set[str]:
    """Returns what an assignment to the target changes: ``x``, ``.attribute``, or each of several."""
    match target:
        case ast.Attribute(attr=name):
            return {f".{name}"}
        case ast.Subscript(value=value):
            return _leaves(value)
        case ast.Tuple() | ast.List() | ast.Starred():
            return set().union(*map(_leaves, ast.iter_child_nodes(target)))
    return {target.id} if isinstance(target, ast.Name) else set()


def _words(annotation: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}


class _Codemod(cst.CSTTransformer):
    """Renames in one file.

    Attributes:
        left: Names with a use that was left alone; texts and strings keep them.
    """

    METADATA_DEPENDENCIES = (ParentNodeProvider, PositionProvider)

    def __init__(self, found: _Survey, keep_in_text: Set[str], its_own: bool) -> None:
        super().__init__()
        self._its_own = its_own
        self._found = found
        self._keep_in_text = keep_in_text
        self.left = set(found.clashing)
        self.doubtful: Doubtful = []

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:  # type: ignore[override]
        match original_node:
            case cst.Name(value=old) if old in _METHOD_KEYWORDS or mentions(old):
                new = self._identifier(original_node, old)
            case cst.SimpleString(raw_value=old, prefix=prefix, quote=quote) if mentions(old):
                new = prefix + quote + self._string(original_node, old) + quote
            case cst.FormattedStringText(value=old) if mentions(old):
                new = self._message(original_node, old)
            case cst.Comment(value=old):
                new = self._text(old)
            case cst.Call(func=method) if _last_name(method) == OLD_METHOD:
                assert isinstance(updated_node, cst.Call)
                return self._arguments(original_node, updated_node)
            case cst.FunctionDef(name=cst.Name(value=old), params=parameters) if old == OLD_METHOD:
                if any(parameter.name.value == OLD_PARAMETER for parameter in parameters.params):
                    self._note(original_node, OLD_SIGNATURE)
                return updated_node
            case _:
                return updated_node
        return updated_node.with_changes(value=new)

    def _text(self, old: str) -> str:
        """Returns a comment, a docstring or a message in the present words."""
        new = replace_phrases(old)
        return replace_names(words.replace_root(new) if self._its_own else new, self._keep_in_text)

    def _arguments(self, old: cst.Call, new: cst.Call) -> cst.Call:
        """Returns a call of the method with keywords: it had one parameter more, the first.

        Callers with the earlier names of ``sent_tokens`` passed the allocation first, as now.
        """
        given = [argument.keyword.value if argument.keyword is not None else "" for argument in old.args]
        if _last_name(new.func) == OLD_METHOD or not _METHOD_KEYWORDS.keys().isdisjoint(given):
            return new
        named = [name or parameter for name, parameter in zip(given, _OLD_PARAMETERS, strict=False)]
        if named == given and OLD_PARAMETER not in given and not any(argument.star for argument in old.args):
            return new
        is_none = [isinstance(a.value, cst.Name) and a.value.value == "None" for a in old.args]
        certain = len(given) <= len(_OLD_PARAMETERS) and not any(argument.star for argument in old.args)
        if not certain or any(n == OLD_PARAMETER and not none for n, none in zip(named, is_none, strict=True)):
            self._note(old, OLD_SIGNATURE)
            return new
        close = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
        kept = [
            argument if argument.keyword is not None else argument.with_changes(keyword=cst.Name(name), equal=close)
            for name, argument in zip(named, new.args, strict=True)
            if name != OLD_PARAMETER
        ]
        if kept and named[-1] == OLD_PARAMETER:
            kept[-1] = kept[-1].with_changes(comma=new.args[-1].comma)
        return new.with_changes(args=kept)

    def _identifier(self, node: cst.Name, name: str) -> str:
        owner: cst.BaseExpression = node
        match parent := self._parent(node):
            case cst.Attribute(attr=attr, value=value) if attr is node:
                owner = value
            case cst.Arg(keyword=keyword) if keyword is node and isinstance(call := self._parent(parent), cst.Call):
                owner = call.func
                if _last_name(owner) in _METHODS and name in _METHOD_KEYWORDS and name not in self._found.clashing:
                    return _METHOD_KEYWORDS[name]
                if _last_name(owner) in _FILL_KEYS and name in NAMES:
                    return self._leave(node, name, OWN_KEY)
        if name in NAMES:
            return self._renamed(node, name, owner)
        return self._leave(node, name, OWN_NAME) if words.ROOT in name.lower() and name not in self.left else name

    def _renamed(self, node: cst.CSTNode, name: str, owner: cst.BaseExpression) -> str:
        """Returns the new form of a name of the table, which is a name of ``owner`` or is ``owner`` itself."""
        if name in self._found.clashing:
            return self._leave(node, name, CLASH)
        foreign = self._found.foreign if name in GENERIC else self._found.imported
        source = ast.parse(f"({cst.Module([]).code_for_node(owner)}\n)", mode="eval")
        return NAMES[name] if foreign.isdisjoint(_origins(source)) else self._leave(node, name, FOREIGN)

    def _leave(self, node: cst.CSTNode, old: str, reason: str) -> str:
        self.left.add(old)
        self._note(node, reason.format(old))
        return old

    def _note(self, node: cst.CSTNode, reason: str) -> None:
        self.doubtful.append((self.get_metadata(PositionProvider, node).start.line, reason))

    def _parent(self, node: cst.CSTNode) -> cst.CSTNode:
        return self.get_metadata(ParentNodeProvider, node)

    def _string(self, node: cst.SimpleString, old: str) -> str:
        if old in NAMES:
            parent = self._parent(node)
            call = self._parent(parent)
            if isinstance(call, cst.Call) and parent in call.args[1:2] and _last_name(call.func) in _TAKE_A_NAME:
                return self._renamed(node, old, call.args[0].value)
            is_name = old not in GENERIC or self._is_slot(node)
            return self._renamed(node, old, node) if is_name else self._leave(node, old, OWN_KEY)
        if " " not in old and re.search(SYSTEM, old):
            return replace_names(old, self._keep_in_text)  # a dotted path, as mock.patch takes it
        return self._message(node, old)

    def _message(self, node: cst.CSTNode, old: str) -> str:
        new = self._text(old) if self._is_message(node) else replace_phrases(old)
        if mentions(new):
            self._note(node, OWN_TEXT)
        return new

    def _is_message(self, node: cst.CSTNode) -> bool:
        """Returns whether the string is a docstring or part of a log line or an error."""
        while not isinstance(node := self._parent(node), cst.BaseSmallStatement | cst.BaseStatement):
            if isinstance(node, cst.Call) and _last_name(node.func) in _SAY:
                return True
        return isinstance(node, cst.Raise | cst.Assert) or (
            isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)
        )

    def _is_slot(self, node: cst.CSTNode) -> bool:
        while isinstance(node := self._parent(node), cst.Element | cst.Tuple | cst.List):
            pass
        return isinstance(node, cst.Assign) and _last_name(node.targets[0].target) in ("__slots__", "__match_args__")


def _last_name(node: cst.BaseExpression) -> str:
    """Returns ``c`` of ``a.b.c`` and of ``c``; the empty string for anything else."""
    match node:
        case cst.Attribute(attr=cst.Name(value=name)) | cst.Name(value=name):
            return name
    return ""
