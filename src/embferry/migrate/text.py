"""Log searches in anything that is not Python: shell scripts, YAML, JSON, Markdown, Makefiles.

Only patterns are rewritten: those of ``grep`` and similar tools, of LogQL line filters (``|= "…"``) and of keys such as
``pattern:``, and only where logs are searched or the file names the system.
"""

from __future__ import annotations

import re

from . import words

Span = tuple[int, int]

_TOKEN = re.compile(r"""(?:\s|\\\r?\n)*('[^']*'|"(?:\\.|[^"\\])*"|(?:\\.|[^\s'"|;&`])+)""")
_GREP = r"(?P<grep>[efzx]?grep|git[ ]+grep|rg|ag|ack|findstr|Select-String)"
_MAX_TOKENS = 64  # a line without line breaks can be megabytes long
_TOOL = re.compile(rf"(?<![\w./-])(?:{_GREP}|[gm]?awk|sed|journalctl|lnav|less)(?=\s)")
_PATTERN_OPTION = re.compile(r"-[A-Za-z]*e|--regexp|-Pattern")
_VALUE_OPTION = re.compile(r"-[ABCmdfgtT]|--(?:max-count|context|include|exclude|glob|type|file|color)|-Path")
_LINE_FILTER = re.compile(r"""((?:\|=|\|~|!=|!~)[ \t]*)(\\?"(?:\\.|[^"\\])*"|`[^`]*`)""")
_KEYS = "patterns?|regexp?|match|query|expr|expression|filter|contains|search|grep|include"
_KEY = re.compile(rf"""^([ \t-]*["']?(?:{_KEYS})["']?[ \t]*[:=][ \t]*)(\S.*?)(?=[ \t]*\r?$)""")
_LOGS = re.compile(r"(?i)\blogs?\b|[\w-]+\.log|(?:\blog|logs)[_/-]|journalctl|\b(?:loki|promtail|fluent\w*|filebeat)\b")
_SYSTEM = re.compile(rf"{words.SYSTEM}|\b(?:sglang|embferry)\b")
_NO_WORDS = re.compile(rf"\\+[A-Za-z]|\(\?[A-Za-z]+\)|{'|'.join(words.PHRASES.values())}", re.IGNORECASE)
# A shell continues a line that ends with a backslash.
_LINES = re.compile(r"(?:[^\n]*\\\r?\n)*[^\n]*(?:\n|\Z)")

OUTSIDE = "an old name outside of a search pattern; left alone"


def rewrite(text: str, assume: bool = False) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Returns the text with its log searches in the present words, and the doubtful places as (line, reason).

    Args:
        text: The contents of a file.
        assume: Treat all its searches as searches of the system's logs.
    """
    system = assume or bool(_SYSTEM.search(text))
    in_logs = system or bool(_LOGS.search(text))
    new = "".join(_line(line, system, in_logs) for line in _LINES.findall(text))
    lines = enumerate(new.split("\n"), start=1) if system else ()
    return new, tuple((number, OUTSIDE) for number, line in lines if _known(line) != line)


def _line(line: str, system: bool, in_logs: bool) -> str:
    if not words.mentions(line):
        return line
    if system or _LOGS.search(line):
        for start, end in reversed(_patterns(line)):
            line = line[:start] + _pattern(line[start:end]) + line[end:]
    line = _LINE_FILTER.sub(lambda match: match[1] + _pattern(match[2]), line)
    return _KEY.sub(lambda match: match[1] + _pattern(match[2]), line) if in_logs else line


def _patterns(line: str) -> list[Span]:
    """Returns where the patterns of the line's search commands are, from left to right."""
    found: list[Span] = []
    position = 0
    while tool := _TOOL.search(line, position):
        found += (spans := _patterns_of(line, tool))
        position = spans[-1][1] if spans else tool.end()
    return found


def _patterns_of(line: str, tool: re.Match[str]) -> list[Span]:
    """Returns where the patterns of one command are: after ``-e`` each time, or else the first argument."""
    given: list[Span] = []
    arguments: list[Span] = []
    position, option = tool.end(), ""
    for _ in range(_MAX_TOKENS):
        if (token := _TOKEN.match(line, position)) is None:
            break
        position, text = token.end(), token[1]
        if _PATTERN_OPTION.fullmatch(option):
            given.append(token.span(1))
        elif not tool["grep"]:
            arguments += [token.span(1)] if text[0] in "'\"" else []
        elif not text.startswith("-") and not _VALUE_OPTION.fullmatch(option):
            arguments.append(token.span(1))
        option = text
    return given or arguments[:1]


def _pattern(pattern: str) -> str:
    """Returns a pattern in the present words; the root word changes only beside words of the system."""
    new = _known(pattern)
    others = {word.lower() for word in re.findall("[A-Za-z]+", _NO_WORDS.sub(" ", new))}
    if others - {words.ROOT, words.ROOT + "s", words.NEW_ROOT} <= words.VOCABULARY:
        new = words.replace_root(new, rf"(?<![\w-]){words.ROOT}s?(?![\w-])")
    return new


def _known(text: str) -> str:
    return words.replace_names(words.replace_phrases(text))
