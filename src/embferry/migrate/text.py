"""Log searches in anything that is not Python: shell scripts, YAML, JSON, Markdown, Makefiles.

Only patterns are rewritten: those of ``grep`` and similar tools, of LogQL line filters (``|= "…"``) and of keys such as
``pattern:``, and only where logs are searched or the file names the system.
"""

from __future__ import annotations

import re

from . import words

_QUOTED = r"""'[^']*'|"(?:\\.|[^"\\])*\""""
_ARGUMENT = rf"""({_QUOTED}|(?!-)(?:\\.|[^\s'"|;&`\\])+)"""
_GAP = r"(?:[ \t]|\\\r?\n)+"
_START = r"(?<![\w./-])"
_GREP = re.compile(
    rf"""{_START}(?:[efzx]?grep|rg|ag|ack|findstr|Select-String)(?:{_GAP}|{_QUOTED}|\\.|[^\s'"|;&`\\])+"""
)
# In the following, the last group that matches is the pattern.
_NEXT_ARGUMENT = re.compile(rf"(?<=\s)(?:-[A-Za-z]*e|--regexp|-Pattern)(?:{_GAP}|=){_ARGUMENT}")
_FIRST_ARGUMENT = re.compile(rf"\A[\w-]+(?:{_GAP}(?:-\S+|\d+(?=\s)))*{_GAP}{_ARGUMENT}")  # 3 is part of "-A 3"
_FIRST_QUOTED = re.compile(rf"""{_START}(?:[gm]?awk|sed|journalctl|lnav|less)\s[^'"|;&`]{{0,200}}({_QUOTED})""")
_LINE_FILTER = re.compile(r"""(?:\|=|\|~|!=|!~)[ \t]*(\\?"(?:\\.|[^"\\])*"|`[^`]*`)""")
_KEYS = "patterns?|regexp?|match|query|expr|expression|filter|contains|search|grep|include"
_KEY = re.compile(rf"""^[ \t-]*["']?(?:{_KEYS})["']?[ \t]*[:=][ \t]*(\S.*?)(?=[ \t]*\r?$)""")
_LOGS = re.compile(r"(?i)\blogs?\b|[\w-]+\.log|(?:\blog|logs)[_/-]|journalctl|\b(?:loki|promtail|fluent\w*|filebeat)\b")
_SYSTEM = re.compile(rf"{words.SYSTEM}|\b(?:sglang|embferry)\b")
_WHOLE_ROOT = re.compile(rf"""(?<![^'"`/|(^]){words.ROOT}s?(?![^'"`/|)$\\])""", re.IGNORECASE)
# A shell continues a line that ends with a backslash.
_LINES = re.compile(r"(?:[^\n]*\\\r?\n)*[^\n]*(?:\n|\Z)")

OUTSIDE = "an old name outside of a search pattern; left alone"


def rewrite(text: str, assume: bool = False) -> tuple[str, words.Doubtful]:
    """Returns the text with its log searches in the present words, and the doubtful places.

    Args:
        text: The contents of a file.
        assume: Treat all its searches as searches of the system's logs.
    """
    system = assume or bool(_SYSTEM.search(text))
    in_logs = system or bool(_LOGS.search(text))
    new = "".join(_line(line, system, in_logs) for line in _LINES.findall(text))
    lines = enumerate(new.split("\n"), start=1) if system else ()
    return new, [(number, OUTSIDE) for number, line in lines if _known(line) != line]


def _line(line: str, system: bool, in_logs: bool) -> str:
    if not words.mentions(line):
        return line
    if system or _LOGS.search(line):
        line = _FIRST_QUOTED.sub(_pattern, _GREP.sub(_grep, line))
    line = _LINE_FILTER.sub(_pattern, line)
    return _KEY.sub(_pattern, line) if in_logs else line


def _grep(command: re.Match[str]) -> str:
    """Returns the command with its patterns in the present words: those after ``-e``, or else the first argument."""
    kind = _NEXT_ARGUMENT if _NEXT_ARGUMENT.search(command[0]) else _FIRST_ARGUMENT
    return kind.sub(_pattern, command[0])


def _pattern(match: re.Match[str]) -> str:
    """Returns the match with its last group, a search pattern, in the present words.

    The root word alone changes only where it is a whole alternative of the pattern.
    """
    found = match.lastindex or 0
    new = _WHOLE_ROOT.sub(lambda root: words.in_case_of(root[0], words.NEW_ROOT), _known(match[found]))
    start, end = match.start(found) - match.start(), match.end(found) - match.start()
    return match[0][:start] + new + match[0][end:]


def _known(text: str) -> str:
    return words.replace_names(words.replace_phrases(text))
