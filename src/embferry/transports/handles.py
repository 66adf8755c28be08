"""Parts of handles, and their decoding. They come from the wire, so every byte of them is untrusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from embferry.protocol.errors import TransportError

MAX_HANDLE_BYTES = 1024
TOKEN_BYTES = 16

Token = Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
"""A random token that a connecting peer must present, which proves that it knows the handle."""
Host = Annotated[str, msgspec.Meta(max_length=64)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

T = TypeVar("T", bound=msgspec.Struct)


def decode_handle(handle: bytes, kind: type[T], transport: str) -> T:
    """Returns the ``kind`` that ``handle`` encodes.

    Raises:
        TransportError: The handle is malformed or of another transport (not retryable).
    """
    if not isinstance(handle, bytes) or len(handle) > MAX_HANDLE_BYTES:
        raise TransportError(
            f"a handle of the {transport} transport is at most {MAX_HANDLE_BYTES} bytes of MessagePack; "
            "ask the receiver for its handle again",
            retryable=False,
        )
    try:
        return msgspec.msgpack.decode(handle, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransportError(
            f"this is not a handle of the {transport} transport ({error}); do both ends use the same one?",
            retryable=False,
        ) from error


def boot_id() -> str:
    """Returns the boot id of this host: the same in all its processes, containers included, and no other host's."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
