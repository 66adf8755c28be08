"""The cluster key: 32 random bytes that every part of a cluster knows, and that no stranger does.

It is written as 64 hexadecimal digits. Two keys are valid at a time, so that one can be replaced while every part goes
on: the first is the current one. A key is never part of a text: not of ``repr``, nor of a log line, nor of an error.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import struct
from pathlib import Path

from embferry.protocol.errors import LocalProtocolError

from .private_files import is_private
from .reread import Reread

KEY_BYTES = 32
PROOF_BYTES = 32
MOST_KEYS = 2
MAX_FILE_BYTES = 64 << 10

_KEY = re.compile(r"[0-9A-Fa-f]{64}")


class Key:
    """One cluster key. It makes proofs, and shows nothing of itself.

    Raises:
        LocalProtocolError: It has not 32 bytes.
    """

    __slots__ = ("_mac", "_secret")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise LocalProtocolError(f"a cluster key has {KEY_BYTES} bytes, this one {len(secret)}")
        self._secret = secret
        self._mac = hmac.new(secret, digestmod=hashlib.sha256)

    @classmethod
    def new(cls) -> Key:
        """Returns a random key."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def mac(self, label: bytes, *parts: bytes) -> bytes:
        """Returns the HMAC-SHA-256, 32 bytes, over ``label`` and ``parts``, each with its length before it.

        The label says what the proof is for, so that it cannot be used for anything else. Compare with
        ``hmac.compare_digest`` only.
        """
        mac = self._mac.copy()
        for part in (label, *parts):
            mac.update(struct.pack("!I", len(part)))
            mac.update(part)
        return mac.digest()

    def written(self) -> str:
        """Returns the key as it stands in a key file. For writing one, and for nothing else."""
        return self._secret.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.mac(b"embferry hash"))

    def __repr__(self) -> str:
        return "Key(…)"


class ClusterKeys:
    """The keys that are valid now: the current one, and perhaps the one before it. Any thread.

    Made by :meth:`of_file`, :meth:`of_text` or with keys. Those of a file are read again when the file has changed,
    so that a key is replaced without a restart. A file that cannot be used any more leaves the last keys valid, and
    is logged once a minute.

    Args:
        keys: One or two, the current one first.

    Raises:
        LocalProtocolError: No key, or more than two.
    """

    def __init__(self, *keys: Key) -> None:
        self._keys = _checked(keys, "ClusterKeys")
        self._file: Reread[tuple[Key, ...]] | None = None
        self._place = "memory"

    @classmethod
    def of_text(cls, text: str, place: str = "the cluster key") -> ClusterKeys:
        """Returns the keys in ``text``, the current one first, at most two.

        Args:
            text: 64 hexadecimal digits a key; a comma or the end of a line ends it. ``#`` begins a comment, as in a key
                file, whose whole content may stand here.
            place: Where the text stands, for errors.

        Raises:
            LocalProtocolError: They are no keys.
        """
        return cls(*_keys(text, place))

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> ClusterKeys:
        """Returns the keys in a file, which holds the same text as that of :meth:`of_text`.

        Raises:
            LocalProtocolError: The file cannot be read, others than its owner may read it, or it holds no keys.
        """
        place = Path(path)
        file = Reread(f"the cluster keys in {place}", (place,), lambda: _read(place))
        keys = cls(*file.value())
        keys._file, keys._place = file, str(place)
        return keys

    def accepted(self) -> tuple[Key, ...]:
        """Returns the valid keys, the current one first."""
        return self._keys if self._file is None else self._file.value()

    def current(self) -> Key:
        """Returns the key to prove with."""
        return self.accepted()[0]

    def __repr__(self) -> str:
        return f"ClusterKeys({len(self._keys)} of {self._place})"


def write_file(path: Path, keys: tuple[Key, ...], *, replace: bool) -> None:
    """Writes a key file that only its owner may read, as a whole or not at all.

    Args:
        path: The file.
        keys: One or two, the current one first.
        replace: Whether the file is there and is replaced; otherwise it must not be there.

    Raises:
        LocalProtocolError: The file cannot be written, or is there already.
    """
    lines = ["# The cluster key of embferry: current, then previous. A reader of it can join the cluster."]
    text = "\n".join(lines + [key.written() for key in _checked(keys, str(path))]) + "\n"
    path = path.resolve()  # a link stays one
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                if replace:
                    status = os.stat(path)
                    os.fchown(descriptor, status.st_uid, status.st_gid)  # the parts of its owner must go on
                os.fchmod(descriptor, 0o600)  # the umask may have taken rights away
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            if replace:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # fails if the file is there
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise LocalProtocolError(f"{path} is there already; to replace its key: embferry keys rotate {path}") from None
    except OSError as error:
        raise LocalProtocolError(f"{path} cannot be written: {error.strerror}") from error


def _read(path: Path) -> tuple[Key, ...]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise LocalProtocolError(f"the cluster key file {path} is no file")
            if not is_private(status):
                raise LocalProtocolError(f"others may read the cluster key file {path}; do: chmod 600 {path}")
            data = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise LocalProtocolError(f"the cluster key file {path} cannot be read: {error.strerror}") from error
    return _keys(data.decode("utf-8", "replace"), str(path))


def _keys(text: str, place: str) -> tuple[Key, ...]:
    """Returns the keys in a file or a variable: a comma or the end of a line ends one, and ``#`` begins a comment."""
    keys, lines = [], text.splitlines()
    for number, line in enumerate(lines, 1):
        written = line.partition("#")[0].strip()
        where = f"{place}, line {number}" if len(lines) > 1 else place
        keys += [_key(part.strip(), where) for part in written.split(",")] if written else []
    return _checked(keys, place)


def _key(text: str, place: str) -> Key:
    if not _KEY.fullmatch(text):
        raise LocalProtocolError(f"{place}: a cluster key has 64 hexadecimal digits; embferry keys new makes one")
    return Key(bytes.fromhex(text))


def _checked(keys: tuple[Key, ...] | list[Key], place: str) -> tuple[Key, ...]:
    if not 1 <= len(keys) <= MOST_KEYS:
        raise LocalProtocolError(f"{place} holds {len(keys)} cluster keys; 1 or {MOST_KEYS} are right")
    return tuple(keys)
