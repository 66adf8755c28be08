"""The words of ``embferry ask``: the router's address, the files, and the question."""

from __future__ import annotations

import base64
import mimetypes
import os
import shlex
from typing import Any
from urllib.parse import urlsplit

from embferry.cli.ask_files import STDIN, Files, kind_by_name, kind_of, text_from_stdin
from embferry.cli.options import fail
from embferry.serve.config import LanguageSettings
from embferry.serve.media.formats import Kind

_URLS = ("http://", "https://", "data:", "file:")
_ENDPOINTS = ("/v1/chat/completions", "/v1")
_SCHEMES = ("http", "https")
_EXAMPLE_QUESTION = 'such as "what is there?"'
_EXAMPLE = "such as --url http://127.0.0.1:8000"
_MAX_QUESTION_BYTES = 4 * LanguageSettings().prompt_characters
"""UTF-8 has at most 4 bytes a character."""


def base_url(url: str, scheme: str) -> str:
    """Returns the router's base URL, also if ``url`` has no scheme or is that of an OpenAI client, with ``/v1``.

    Ends the process if no router can have this URL.
    """
    given = url.strip()
    full = (given if "://" in given else f"{scheme}://{given}").rstrip("/")
    full = next((full.removesuffix(end) for end in _ENDPOINTS if full.endswith(end)), full)
    if why := _wrong(given, full):
        fail(f"--url {given} is wrong: {why}; write it {_EXAMPLE}")
    return full


def _wrong(given: str, full: str) -> str:
    """Returns what is wrong with a URL; "" if nothing is."""
    try:
        parts = urlsplit(full)
        host = parts.hostname
    except ValueError as error:  # of brackets
        return str(error)[:1].lower() + str(error)[1:]
    if parts.scheme.lower() not in _SCHEMES:
        return f"{parts.scheme}:// is not spoken here, http:// and https:// are"
    if "://" not in given and given.lower().partition(":")[0] in _SCHEMES:
        return "two slashes follow the colon"
    if not host:
        return "it names no host"
    if not all(character.isprintable() and character != " " for character in full):
        return "it has a space or control character"
    if host.isascii() and not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        return f"{host} is no name of a host"
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or parts.netloc.endswith(":"):
        return f"the port {parts.netloc.rpartition(':')[2] or 'after the colon'} is no number from 1 to 65535"
    return ""


def content(words: list[str], files: Files | None = None) -> list[dict[str, Any]]:
    """Returns the parts of the message. Ends the process if a file cannot be read, or there is no question."""
    files = files or Files()
    *media, question = words
    if words.count(STDIN) > 1:
        fail(f"{STDIN} stands for standard input, which can be read once")
    if question == STDIN:
        question = text_from_stdin(_MAX_QUESTION_BYTES)
    elif not question.strip():
        fail(f"the question is empty; write one, in quotes, {_EXAMPLE_QUESTION}")
    elif is_media(question):
        if len(asked := [word for word in media if _is_question(word)]) == 1:
            files_first = shlex.join([*(word for word in words if word != asked[0]), asked[0]])
            fail(f"the question comes last: embferry ask {files_first}")
        fail(f"no question: add one after {question}, in quotes, {_EXAMPLE_QUESTION}")
    return [*(part(word, files) for word in media), {"type": "text", "text": question}]


def _is_question(word: str) -> bool:
    """Returns whether a word can only be a question: no file has this name, and it does not look like one or a URL."""
    return word != STDIN and not is_media(word) and not os.path.exists(word)


def is_media(word: str) -> bool:
    """Returns whether a word is a file or URL and not a question: by its name, or because the file exists."""
    if os.path.exists(word) and not os.path.isdir(word):
        return True
    kind, _ = mimetypes.guess_type(word.partition("?")[0])
    is_named_so = word.lower().startswith(_URLS) or (kind or "").startswith(("image/", "video/"))
    return is_named_so and len(word.split()) == 1


def part(word: str, files: Files | None = None) -> dict[str, Any]:
    """Returns the part of a message for a URL, by its name; for a file or ``-``, by its bytes.

    Ends the process if the file cannot be read.
    """
    if word.lower().startswith(_URLS):
        return _part(kind_by_name(word), word)
    data = (files or Files()).read(word)
    # The router detects the format in the bytes, so the content type does not matter.
    return _part(kind_of(data, word), f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}")


def _part(kind: Kind, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
