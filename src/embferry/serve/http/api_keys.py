"""The API keys of a router's clients: a file with one key a line, which holds no key but its hash.

    # name  hash of the key  limits that differ from the settings
    alice   sha256:9f86d0…   requests=8 requests_per_second=5 bytes_per_second=10000000

``embferry keys api new NAME --file FILE`` makes a key, adds its line and prints the key once. The file is looked at
again with each request, so a line that is added or deleted counts at once.

The hash is plain SHA-256. A slow one (scrypt, Argon2) protects passwords, which can be guessed; these keys are 256
random bits, so that even a fast hash cannot be searched, and a slow one would only let strangers keep the router busy.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from embferry.protocol.errors import LocalProtocolError
from embferry.trust.reread import Reread

PREFIX = "embferry-"
"""The beginning of every key, so that programs that search for leaked keys can tell one."""
MAX_KEYS = 1024
MAX_FILE_BYTES = 1 << 20
SETTING_NAME = "router.api_key"
"""The name of the key in the setting of that name; no name in the file has a dot."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one client; None: what the settings say for every client.

    Attributes:
        requests: at once.
        requests_per_second: on average.
        bytes_per_second: of request bodies, on average.
    """

    requests: int | None = None
    requests_per_second: float | None = None
    bytes_per_second: float | None = None

    def over(self, others: Limits) -> Limits:
        """Returns these limits, completed by others."""
        return Limits(*(getattr(self, f.name) or getattr(others, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file."""

    name: str
    sha256: bytes
    limits: Limits = Limits()

    def line(self) -> str:
        """Returns the key as a line of the file, without its end."""
        given = [(field.name, getattr(self.limits, field.name)) for field in fields(self.limits)]
        options = [f"{name}={value:.15g}" for name, value in given if value is not None]
        return " ".join([self.name, f"sha256:{self.sha256.hex()}", *options])


class ApiKeysError(LocalProtocolError):
    """The file cannot be used; the message names it and the line."""


def new_key() -> str:
    """Returns a new key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    """Returns the hash of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse(text: str, place: str) -> tuple[ApiKey, ...]:
    """Returns the keys in the text of a file.

    Args:
        text: of the file.
        place: its name, for errors.

    Raises:
        ApiKeysError: a line is malformed, a name or a key occurs twice, or there are more than ``MAX_KEYS``.
    """
    found: dict[str, ApiKey] = {}
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = _key(words)
        except ValueError as error:
            raise ApiKeysError(f"{place}, line {number}: {error}") from error
        if key.name in found:
            raise ApiKeysError(f"{place}, line {number}: the name {key.name} occurs twice")
        if (other := names.setdefault(key.sha256, key.name)) != key.name:
            raise ApiKeysError(f"{place}, line {number}: {key.name} has the same key as {other}; each needs its own")
        found[key.name] = key
    if len(found) > MAX_KEYS:
        raise ApiKeysError(f"{place} has {len(found)} keys; {MAX_KEYS} are allowed")
    return tuple(found.values())


def _key(words: list[str]) -> ApiKey:
    if len(words) < 2 or not _NAME.fullmatch(words[0]) or not (hashed := _HASH.fullmatch(words[1])):
        raise ValueError("a line is a name of letters, digits, - and _, then sha256: and 64 hex digits, then limits")
    return ApiKey(words[0], bytes.fromhex(hashed[1]), limits_of(words[2:]))


def limits_of(words: Iterable[str]) -> Limits:
    """Returns limits written as ``requests=8``. Raises ValueError if one is malformed."""
    given: dict[str, float] = {}
    known = [field.name for field in fields(Limits)]
    for word in words:
        name, _, value = word.partition("=")
        try:
            given[name] = number = int(value) if name == "requests" else float(value)
        except ValueError:
            number = 0.0
        if name not in known or not 0 < number < 1e15:
            raise ValueError(f"{word!r} is not a limit such as requests=8; there are {', '.join(known)}")
    return Limits(**given)  # type: ignore[arg-type]  # requests is an int


def read(path: Path) -> tuple[ApiKey, ...]:
    """Returns the keys of a file.

    Raises:
        ApiKeysError: it cannot be read, is malformed, or others than its owner may write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except FileNotFoundError as error:
        advice = f"make one with: embferry keys api new NAME --file {path}"
        raise ApiKeysError(f"the API keys in {path} cannot be read: there is no such file; {advice}") from error
    except OSError as error:
        raise ApiKeysError(f"the API keys in {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ApiKeysError(f"the API keys in {path} cannot be read: it is no text in UTF-8") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ApiKeysError(f"others may write {path} and so let themselves in; run: chmod go-w {path}")
    if len(data) > MAX_FILE_BYTES:
        raise ApiKeysError(f"{path} is longer than {MAX_FILE_BYTES} bytes")
    return parse(text, str(path))


class ApiKeys:
    """The keys of a router: those of the file, and the one of the setting.

    Args:
        path: of the file; None: there is none.
        setting: the key in the setting ``router.api_key``.
        clock: monotonic seconds.

    Raises:
        ApiKeysError: the file cannot be used. Later, the last good keys stay, and the log says so once a minute.
    """

    def __init__(
        self, path: Path | None, setting: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fixed = () if setting is None else (ApiKey(SETTING_NAME, digest_of(setting)),)
        self._file = None if path is None else Reread(f"the API keys in {path}", (path,), lambda: read(path), clock)

    @property
    def required(self) -> bool:
        """Whether clients need a key."""
        return bool(self._fixed) or self._file is not None

    def find(self, key: str) -> ApiKey | None:
        """Returns the entry of a key, or None. Takes the same time for each key, known or not."""
        digest, found = digest_of(key), None
        for one in (*self._fixed, *(self._file.value() if self._file is not None else ())):
            if hmac.compare_digest(one.sha256, digest):
                found = one
        return found
