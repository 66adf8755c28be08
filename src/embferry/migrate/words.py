"""The table of old and new names and phrases, and functions that apply it to text."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import PurePath


def split(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROOT = "continuation"
NEW_ROOT = "resume"
NAMES = {
    "needs_continuation": "needs_resume",
    "init_continuation": "resume_transfer",
    "partial_data": "buffered_chunks",
    "received_tokens": "transferred_tokens",
    "received_length": "transferred_length",
}
GENERIC = frozenset({"partial_data", "received_tokens", "received_length"})
"""Names that other libraries use, too."""

_STAYS_A_NOUN = ("buffer", "blocks", "allocation", "for room")
_STARTS_OR_ENDS = ("start", "starting", "completed", "completed with")
PHRASES = {
    f"{ROOT} transfer": "resumed transfer",
    f"{ROOT} transfers": "resumed transfers",
    f"{ROOT} request": "resume transfer request",
    f"{ROOT} requests": "resume transfer requests",
    f"{ROOT} transfer request": "resume transfer request",
    f"{ROOT} transfer requests": "resume transfer requests",
    f"init {ROOT}": "resume transfer",
    f"waiting for {ROOT}": "waiting for resume",
    **{f"{before} {ROOT}": f"{before} resume for remaining data" for before in ("need", "needs")},
    **{
        f"{before} {ROOT} for {rest}": f"{before} resume for remaining data"
        for before in ("need", "needs")
        for rest in ("remaining data", "the remaining data", "the rest")
    },
    **{f"{before} {ROOT}": f"{before} resumed transfer" for before in _STARTS_OR_ENDS},
    **{f"{before} {ROOT} transfer": f"{before} resumed transfer" for before in _STARTS_OR_ENDS},
    **{f"{ROOT} {after}": f"resume {after}" for after in _STAYS_A_NOUN},
    **{f"{ROOT} {after}": f"resumed transfer {after}" for after in ("complete", "completed", "failed")},
}
"""Phrases in logs, errors and comments of the system."""

OTHER_MEANINGS = split("line lines byte bytes http https 100 header headers frame frames utf backslash string")
"""A phrase directly after one of these words is about something else, such as "HTTP continuation request"."""

MODULES = split("multimodal_language multimodal_embedding conn_multimodal")
CLASSES = split("""
    MultimodalLanguageRequest MultimodalLanguagePreallocQueue MultimodalLanguageTransferQueue
    MultimodalEmbeddingBootstrapQueue MultimodalDataBuffers ReqToMetadataBlockAllocator MetadataAllocation
    TransferEmbeddingInfo TransferEmbeddingChunk EmbeddingArgsRegisterInfo EmbeddingTransferError
    MooncakeEmbeddingManager MooncakeEmbeddingSender MooncakeEmbeddingReceiver MooncakeEmbeddingBootstrapServer
    """)
SYSTEM = rf"\b(?:{'|'.join(sorted(MODULES | CLASSES))})\b"
"""Pattern of the names that only users of the system write."""


def is_of_system(path: PurePath) -> bool:
    """Returns whether a file is one of the system's own, by its path."""
    return path.stem in MODULES or "disaggregation" in path.parts[:-1]


MENTIONS = re.compile("|".join((ROOT, *sorted(GENERIC))).encode(), re.IGNORECASE)
"""A file that this finds nothing in has no old name."""

_GAP = r"(?:[ \t]+|-|\\s[+*]?|\.[*+]\??)"
"""Separators of the words of a phrase, in a log line or in a pattern that searches for it."""
_PHRASE = re.compile(
    rf"(?<![\w-])(?:{'|'.join(old.replace(' ', _GAP) for old in sorted(PHRASES, key=len, reverse=True))})(?![\w-])",
    re.IGNORECASE,
)
_ROOT = re.compile(rf"(?<![\w-]){ROOT}(s?)(?![\w-])", re.IGNORECASE)
_WORD_BEFORE = re.compile(rf"(\w+){_GAP}\Z")
# A placeholder ({name}, %(name)s, $name) is no mention of a name.
_NAME = re.compile(rf"(?<![\w{{$-])(?<!%\()(?:{'|'.join(NAMES)})(?![\w-])")


Doubtful = list[tuple[int, str]]
"""Places that a person has to look at: (line, reason), the line counted from 1; 0 stands for the whole file."""


class RewriteError(Exception):
    """The file cannot be rewritten and must stay as it is; the text says why."""


def mentions(text: str) -> bool:
    """Returns whether the text contains an old word."""
    return bool(MENTIONS.search(text.encode("utf-8", "surrogatepass")))


def replace_phrases(text: str) -> str:
    """Returns the text with the system's phrases in their new form, their case and spacing kept."""
    return _PHRASE.sub(_new_phrase, text)


def replace_root(text: str) -> str:
    """Returns the text with the root word replaced wherever it is a whole word. For texts of the system's own files."""
    return _ROOT.sub(lambda match: _unless_other(match, in_case_of(match[0], NEW_ROOT) + match[1]), text)


def replace_names(text: str, keep: Container[str] = ()) -> str:
    """Returns the text with the names of the table replaced where they are whole words, except those in ``keep``."""
    return _NAME.sub(lambda match: match[0] if match[0] in keep else NAMES[match[0]], text)


def in_case_of(old: str, new: str) -> str:
    """Returns the new word in capitals, or with a capital, if the old one is."""
    if old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _new_phrase(match: re.Match[str]) -> str:
    old = re.split(_GAP, match[0])
    new = PHRASES[" ".join(old).lower()].split(" ")
    gaps = re.findall(_GAP, match[0])
    gaps += [gaps[-1]] * (len(new) - 1 - len(gaps))
    cased = [in_case_of(old[min(place, len(old) - 1)], word) for place, word in enumerate(new)]
    new_text = "".join(part for pair in zip(cased, [*gaps, ""], strict=False) for part in pair)
    return _unless_other(match, new_text)


def _unless_other(match: re.Match[str], new: str) -> str:
    """Returns the new text, or the match as it is if the word before it gives it another meaning."""
    before = _WORD_BEFORE.search(match.string, 0, match.start())
    return match[0] if before is not None and before[1].lower() in OTHER_MEANINGS else new
