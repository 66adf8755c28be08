"""The table applied to text: names, compound names and phrases, their case and spacing kept."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .renames import FOREIGN_WORDS, NAMES, NEW_ROOT, PHRASES, PLAIN, ROOT_WORD, VOCABULARY

MENTIONS = re.compile("|".join((ROOT_WORD, *sorted(PLAIN))).encode("ascii"), re.IGNORECASE)
"""Any of the old words: what does not mention one needs no closer look."""

GAP = r"(?:[ \t]+|-|\\s[+*]?|\.[*+]\??)"
"""What may stand between the words of a phrase, in a log line or in a pattern that looks for it."""

_WORD_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_GAP = re.compile(GAP)
_PHRASE = re.compile(rf"(?<![\w-])(?:{'|'.join(old.replace(' ', GAP) for old, _ in PHRASES)})(?![\w-])", re.IGNORECASE)
_NEW_PHRASES = dict(PHRASES)
_BEFORE = re.compile(rf"([\w]+){GAP}\Z")
# Not a placeholder: {name}, %(name)s, $name.
_NAME = re.compile(rf"(?<![\w{{$-])(?<!%\()(?:{'|'.join(NAMES)})(?![\w-])")
_ROOT = re.compile(ROOT_WORD, re.IGNORECASE)


def mentions(text: str) -> bool:
    """Whether an old word is in it."""
    return bool(MENTIONS.search(text.encode("utf-8", "surrogatepass")))


def keep_case(old: str, new: str) -> str:
    """``new`` in the case of ``old``: lower, Capitalised or UPPER."""
    if old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def root_replaced(text: str) -> str:
    return _ROOT.sub(lambda match: keep_case(match[0], NEW_ROOT), text)


def compound(name: str) -> str | None:
    """The new form of a name that is made of the root word and other words of the family; None if it is not."""
    parts = [part.lower() for part in _WORD_PARTS.findall(name)]
    others = [part for part in parts if part not in (ROOT_WORD, ROOT_WORD + "s")]
    if len(others) == len(parts) or not others or not VOCABULARY.issuperset(others):
        return None
    return root_replaced(name)


def phrases(text: str) -> str:
    """``text`` with the system's phrases in their new form."""
    return _PHRASE.sub(_new_phrase, text)


def names(text: str, which: Iterable[str] = NAMES) -> str:
    """``text`` with those of the names that stand in it as whole words, placeholders excepted."""
    allowed = frozenset(which)
    return _NAME.sub(lambda match: NAMES[match[0]] if match[0] in allowed else match[0], text)


def _new_phrase(match: re.Match[str]) -> str:
    before = _BEFORE.search(match.string, 0, match.start())
    if before is not None and before[1].lower() in FOREIGN_WORDS:
        return match[0]
    old = _GAP.split(match[0])
    new = _NEW_PHRASES[" ".join(old).lower()].split(" ")
    gaps = _GAP.findall(match[0])
    gaps += [gaps[-1]] * (len(new) - 1 - len(gaps))
    # A word keeps its own case where it is the same word; the others follow the word they stand for.
    cased = [keep_case(old[min(place, len(old) - 1)], word) for place, word in enumerate(new)]
    return "".join(part for pair in zip(cased, [*gaps, ""], strict=False) for part in pair)
