"""Log searches in anything that is not Python: shell scripts, YAML, JSON, Markdown, Makefiles.

Only patterns are rewritten, never the text around them: the pattern of ``grep`` and its like, of a LogQL line filter
(``|= "…"``), and of a key that holds one (``pattern:``), and only where logs are searched or the
file has to do with the system. The root word alone becomes the new one only if no word beside it makes it mean
something else.
"""

from __future__ import annotations

import re
from itertools import islice, pairwise

from .renames import CLASSES, MODULES, NEW_ROOT, PHRASES, ROOT_WORD, VOCABULARY
from .words import keep_case, mentions, names, phrases

_TOKENS = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|(?:\\.|[^\s'"|;&`)])+""")
MAX_TOKENS = 64
"""Words of a command that are looked at."""
_SEARCH_TOOL = re.compile(r"(?<![\w./-])(?:[efzx]?grep|git[ ]+grep|rg|ag|ack|findstr|Select-String)(?=\s)")
_QUOTED_TOOL = re.compile(r"(?<![\w./-])(?:[gm]?awk|sed|journalctl|lnav|less)(?=\s)")
_TAKES_A_VALUE = re.compile(r"-[ABCmdfgtT]|--(?:max-count|context|include|exclude|glob|type|file|color|Path)|-Path\Z")
_PATTERN_OPTION = re.compile(r"-[A-Za-z]*e|--regexp|-Pattern")
_LINE_FILTER = re.compile(r"""(?:\|=|\|~|!=|!~)[ \t]*(?P<pattern>\\?"(?:\\.|[^"\\])*"|`[^`]*`)""")
_KEY = re.compile(
    r"""^[ \t-]*["']?(?:patterns?|regexp?|match|query|expr|expression|filter|contains|search|grep|include)["']?[ \t]*"""
    r"""[:=][ \t]*(?P<pattern>\S.*?)[ \t]*\r?$"""
)
_END = re.compile(r"[|;&]")
_LOGS = re.compile(r"(?i)\blogs?\b|[\w-]+\.log|(?:\blog|logs)[_/-]|journalctl|\b(?:loki|promtail|fluent\w*|filebeat)\b")
_SYSTEM = re.compile(rf"\b(?:{'|'.join(sorted(MODULES | CLASSES))}|sglang|embferry)\b")
_NEW = re.compile("|".join(re.escape(new) for _, new in PHRASES), re.IGNORECASE)
_BARE = re.compile(rf"(?<![\w-]){ROOT_WORD}s?(?![\w-])", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
_NOT_WORDS = re.compile(r"\\+[A-Za-z]|\(\?[A-Za-z]+\)")
"""Escapes and inline flags of regular expressions."""
_LINES = re.compile(r"(?:[^\n]*\\\r?\n)*[^\n]*(?:\n|\Z)")
"""Lines as a shell sees them: one that ends with a backslash goes on in the next."""


def rewrite(text: str, assume: bool = False) -> str:
    """The text with its log searches in the present words.

    :param assume: take it that all its searches look for the system's lines.
    """
    system = assume or bool(_SYSTEM.search(text))
    in_logs = system or bool(_LOGS.search(text))
    return "".join(_line(line, system, in_logs) for line in _LINES.findall(text))


def _line(line: str, system: bool, in_logs: bool) -> str:
    if not mentions(line):
        return line
    searched = system or bool(_LOGS.search(line))
    for start, stop in reversed(_commands(line)):
        line = line[:start] + _pattern(line[start:stop], searched) + line[stop:]
    line = _LINE_FILTER.sub(lambda match: _part(match, True), line)
    return _KEY.sub(lambda match: _part(match, in_logs), line)


def _part(match: re.Match[str], searched: bool) -> str:
    start, stop = match.start("pattern") - match.start(), match.end("pattern") - match.start()
    return match[0][:start] + _pattern(match["pattern"], searched) + match[0][stop:]


def _commands(line: str) -> list[tuple[int, int]]:
    """Where the patterns of the line's search commands stand, from left to right."""
    found = [span for tool in _SEARCH_TOOL.finditer(line) for span in _patterns_of(line, tool.end())]
    for tool in _QUOTED_TOOL.finditer(line):
        found += [token.span() for token in _tokens(line, tool.end()) if token[0][0] in "'\""][:1]
    return sorted(set(found))


def _tokens(line: str, start: int) -> list[re.Match[str]]:
    """The words of a command, to where the next begins."""
    found: list[re.Match[str]] = []
    for token in islice(_TOKENS.finditer(line, start), MAX_TOKENS):
        if _END.search(line[found[-1].end() if found else start : token.start()]):
            break
        found.append(token)
    return [token for token in found if token[0] != "\\"]


def _patterns_of(line: str, start: int) -> list[tuple[int, int]]:
    """What ``grep`` and its like look for: after ``-e`` each time, or else the first word that is no option."""
    tokens = _tokens(line, start)
    given = [after for option, after in pairwise(tokens) if _PATTERN_OPTION.fullmatch(option[0])]
    if given:
        return [token.span() for token in given]
    before = ""
    for token in tokens:
        if token[0].startswith("-") or _TAKES_A_VALUE.fullmatch(before):
            before = token[0]
            continue
        return [token.span()]
    return []


def _pattern(pattern: str, searched: bool) -> str:
    """A pattern in the present words; as it was where it looks for something else."""
    if not searched:
        return pattern
    new = names(phrases(pattern))
    plain = _NOT_WORDS.sub(" ", _NEW.sub(" ", new))
    words = {word.lower() for word in _WORD.findall(plain)}
    if words - {ROOT_WORD, ROOT_WORD + "s", NEW_ROOT} <= VOCABULARY:
        new = _BARE.sub(lambda match: keep_case(match[0], NEW_ROOT), new)
    return new
