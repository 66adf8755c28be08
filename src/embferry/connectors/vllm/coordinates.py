"""The connector's part of ``ec_transfer_params``: where an embedding is, and what it is.

A producer's response has it for each item, and a request to a consumer carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from embferry import CapacityError, LayoutMismatch, LocalProtocolError, RemoteProtocolError
from embferry.protocol.messages import MAX_ID, MAX_TEXT, sendable
from embferry.transfer.control.endpoint import check_endpoint

from ..shared.shape import Dtype, Shape, Tokens, Width

KEY = "embferry"
"""Key of the coordinates in an item's entry of ``ec_transfer_params``, beside the keys of vLLM."""
REFUSED = "embferry_refused"
"""Key in place of :data:`KEY` when an embedding cannot be offered. Its value has ``code`` and ``message``."""
VERSION = 1
MAX_TOKEN_CHARACTERS = 128
MAX_MULTIPLE = 32
"""The width of a token is that of the language model, or with deepstack a multiple: one more for each level."""

Room = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Token = Annotated[str, msgspec.Meta(max_length=MAX_TOKEN_CHARACTERS, pattern=r"^[!-~]*\Z")]
Parsed = TypeVar("Parsed")
UNREADABLE = (msgspec.ValidationError, UnicodeEncodeError, RecursionError)
"""Exceptions of a conversion. JSON may have lone surrogates in its texts, which msgspec cannot read."""


class Coordinates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an embedding is, and what it is.

    Attributes:
        endpoint: The producer. None: no producer offers it, and this consumer has received it before; if the consumer
            has evicted it, it asks the router.
        room: The room in which it is offered.
        tokens: Its rows. None: not known to the sender of these coordinates; those that the prompt has room for.
        width: Elements per token.
        dtype: Name of the elements' type, such as "bfloat16".
        digest: ``digest_of`` its rows, hexadecimal. None: it is still being encoded; the one that the producer
            announces in its transfer.
        version: Version of this structure.
        failover_token: The router's, opaque. With it, the router names another producer for the same room.
    """

    endpoint: str | None
    room: Room
    tokens: Tokens | None
    width: Width
    dtype: Dtype
    digest: Digest | None
    version: int = VERSION
    failover_token: Token | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether the embedding is still being encoded."""
        return self.digest is None

    @property
    def shape(self) -> Shape:
        """The shape. The tokens must be known (:meth:`at_prompt`)."""
        assert self.tokens is not None
        return Shape(self.tokens, self.width, self.dtype)

    def at_prompt(self, tokens: int, dtype: str, hidden: int) -> Coordinates:
        """Returns them with tokens, which the prompt has room for.

        Compares the embedding with that room, and with this model's dtype and width of a token.

        Raises:
            RemoteProtocolError: The number of tokens or the version differs.
            LayoutMismatch: The dtype differs, or the width is no multiple of the model's.
        """
        if self.version != VERSION:
            raise RemoteProtocolError(f"version {self.version} of the transfer parameters; this side has {VERSION}")
        if self.tokens not in (None, tokens):
            raise RemoteProtocolError(f"an embedding of {self.tokens} tokens where the prompt has room for {tokens}")
        if self.dtype != dtype or self.width % hidden or not 1 <= self.width // hidden <= MAX_MULTIPLE:
            why = f"{self.dtype}[{self.width}] there, {dtype}[{hidden}] here; serve the same model on both sides"
            raise LayoutMismatch(why)
        return msgspec.structs.replace(self, tokens=tokens)


class RoomRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to a producer to offer its one item in this room."""

    room: Room


def coordinates_in(entry: Any) -> Coordinates | None:
    """Returns the coordinates in an item's entry, or None. Raises RemoteProtocolError if they are malformed."""
    found = _parsed(entry.get(KEY) if isinstance(entry, dict) else None, Coordinates)
    if found is not None and found.tokens is None and not found.is_awaited:
        raise RemoteProtocolError("malformed transfer parameters: a digest, and no number of tokens")
    if found is not None and found.endpoint is not None:
        try:
            check_endpoint(found.endpoint)
        except LocalProtocolError as error:
            raise RemoteProtocolError(f"malformed transfer parameters: {error.detail}") from None
    return found


def refusal_in(entry: Any) -> CapacityError | None:
    """Returns why the producer does not offer the item, if its entry says so."""
    refused = entry.get(REFUSED) if isinstance(entry, dict) else None
    if not isinstance(refused, dict):
        return None
    code, message = (sendable(str(refused.get(key)), MAX_TEXT) for key in ("code", "message"))
    return CapacityError(f"the producer does not offer it: [{code}] {message}")


def room_request_in(params: Any) -> RoomRequest | None:
    """Returns the room that an encode request asks for, or None. Raises RemoteProtocolError if it is malformed."""
    return _parsed(entry_in(params, KEY), RoomRequest)


def entry_in(params: Any, name: str) -> Any:
    """Returns the value of ``name`` in a request's ``ec_transfer_params``, or None. vLLM does not validate these.

    Raises:
        RemoteProtocolError: The parameters are not an object.
    """
    if params is None:
        return None
    if not isinstance(params, Mapping):
        raise RemoteProtocolError("malformed transfer parameters: ec_transfer_params is not an object")
    return params.get(name)


def failover_token_in(entry: Any) -> str | None:
    """Returns the router's token in an item's entry, also if its coordinates are malformed otherwise."""
    ours = entry.get(KEY) if isinstance(entry, dict) else None
    try:
        return msgspec.convert(ours.get("failover_token") if isinstance(ours, dict) else None, Token | None)
    except UNREADABLE:
        return None


def _parsed(value: Any, kind: type[Parsed]) -> Parsed | None:
    try:
        return None if value is None else msgspec.convert(value, kind)
    except UNREADABLE as error:
        raise RemoteProtocolError(f"malformed transfer parameters: {error}") from None
