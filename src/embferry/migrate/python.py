"""One Python file: parsed, decided about node by node, written again with everything else as it was."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider, ScopeProvider

from .evidence import Origins, belongs
from .identifiers import Edits, Identifiers
from .renames import NAMES
from .strings import Strings
from .words import mentions

_UNREADABLE = (cst.ParserSyntaxError, cst.CSTValidationError, SyntaxError, ValueError, LookupError)

ELSEWHERE = "old names, but nothing in this file uses the system (--assume rewrites it all the same)"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A file's new bytes, its encoding, and what its owner should know: (line, sentence), line 0 for the whole."""

    data: bytes
    encoding: str = "utf-8"
    notes: tuple[tuple[int, str], ...] = ()


class ParseError(Exception):
    """The file is no Python that can be read here, or could not be written as it was; the text says which."""


def rewrite(data: bytes, path: PurePath, own: frozenset[str] = frozenset(), assume: bool = False) -> Rewritten:
    """The file with the present names.

    :param own: top-level names of the user's own modules; see :class:`Origins`.
    :param assume: take it that the file has to do with the system.
    :raises ParseError: it must be left as it is.
    """
    module = _parsed(data)
    try:
        return _rewritten(module, data, path, own, assume)
    except RecursionError:
        raise ParseError("not read: it is nested too deep") from None


def _rewritten(module: cst.Module, data: bytes, path: PurePath, own: frozenset[str], assume: bool) -> Rewritten:
    encoding = module.encoding
    if not assume and not belongs(module, path):
        return Rewritten(data, encoding, ((0, ELSEWHERE),))
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    positions = wrapper.resolve(PositionProvider)
    notes: list[tuple[int, str]] = []

    def note(node: cst.CSTNode, sentence: str) -> None:
        notes.append((positions[node].start.line, sentence))

    origins = Origins(wrapper.resolve(ScopeProvider), wrapper.resolve(ParentNodeProvider), own)
    nodes = _Collected()
    wrapper.module.visit(nodes)
    identifiers = Identifiers(origins, note)
    for name in nodes.names:
        identifiers.see(name)
    identifiers.finish()
    edits = identifiers.edits | _text_edits(nodes, Strings(origins, note, identifiers.left, identifiers.taken))
    changed = wrapper.module.visit(_Applied(edits)) if edits else wrapper.module
    return Rewritten(changed.bytes, encoding, tuple(sorted(set(notes))))


def _parsed(data: bytes) -> cst.Module:
    try:
        # First by the interpreter: it knows how deep it may go, libcst's parser does not.
        with warnings.catch_warnings(action="ignore"):
            ast.parse(data)
        module = cst.parse_module(data)
        same = module.bytes == data
    except (*_UNREADABLE, RecursionError, MemoryError) as error:
        raise ParseError(f"not read: {_in_one_line(error)}") from None
    if not same:
        raise ParseError("not read: it would not be written as it was")
    return module


def _in_one_line(error: Exception) -> str:
    if isinstance(error, cst.ParserSyntaxError):
        return f"line {error.raw_line}: {error.message}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _text_edits(nodes: _Collected, strings: Strings) -> Edits:
    texts: list[tuple[cst.CSTNode, str, str]] = []
    # First the strings that are names: what they tell about a name holds for the texts that mention it.
    in_order = sorted(nodes.strings, key=lambda node: node.raw_value not in NAMES)
    texts += [(node, node.value, strings.string(node)) for node in in_order]
    texts += [(node, node.value, strings.piece(node)) for node in nodes.pieces]
    texts += [(node, node.value, strings.comment(node)) for node in nodes.comments]
    return {node: new for node, old, new in texts if new != old}


class _Collected(cst.CSTVisitor):
    """The nodes that may change: those that mention an old word."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[cst.Name] = []
        self.strings: list[cst.SimpleString] = []
        self.pieces: list[cst.FormattedStringText] = []
        self.comments: list[cst.Comment] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        match node:
            case cst.Name(value=text) if mentions(text):
                self.names.append(node)
            case cst.SimpleString(value=text) if mentions(text):
                self.strings.append(node)
            case cst.FormattedStringText(value=text) if mentions(text):
                self.pieces.append(node)
            case cst.Comment(value=text) if mentions(text):
                self.comments.append(node)
        return True


class _Applied(cst.CSTTransformer):
    """:param edits: by the nodes of the tree that is visited."""

    def __init__(self, edits: Mapping[cst.CSTNode, str]) -> None:
        super().__init__()
        self._edits = edits

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:  # type: ignore[override]
        new = self._edits.get(original_node)
        return updated_node if new is None else updated_node.with_changes(value=new)
