"""What the EC connectors of vLLM want to be told with an encode and with its answer, each in its own way."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from embferry.serve.vllm.fleet import Instance, Life
from embferry.serve.vllm.intake import Item

KEY, REFUSED = "embferry", "embferry_refused"
"""In an item's entry: where our connector has it, or why it cannot offer it."""
_OURS: dict[str, type] = {"endpoint": str, "room": int, "tokens": int, "width": int, "dtype": str}
"""What the router reads, or passes on in another form, of where our connector has an item."""
_TIMED = {"timestamps", "second_per_grid_ts"}
"""Metadata of a video that says when its frames are. Qwen2.5-VL's positions depend on it, and vLLM 0.32 publishes the
grid alone: an answer to the grid would be one to another video."""


@dataclass(slots=True)
class Encoded:
    """An item that an instance has encoded.

    Attributes:
        life: of the instance, when it encoded.
        name: what the instance calls it: the item's ``uuid``, or a digest over it.
        entry: the answer's entry for it: ``metadata`` and the coordinates.
        transfer_id: what the transfer is called, where the router chooses it.
        repeated: encoded for an earlier request. Without an endpoint in its coordinates: the instance that answers has
            received it, and nobody offers it.
    """

    item: Item
    encoder: Instance
    life: Life
    name: str
    entry: dict[str, Any]
    transfer_id: str | None = None
    repeated: bool = False

    def part(self) -> dict[str, Any]:
        """The item for an instance that answers: its grid and its name. The media itself where no metadata stands for
        all of it; the embedding comes over the connector all the same.
        """
        metadata = self.entry.get("metadata") or {}
        if not metadata or (self.item.kind == "video" and not _TIMED & metadata.keys()):
            return self.item.part()
        name = f"{self.item.kind}_embeds"
        grid = {key: list(_flat(value)) for key, value in metadata.items()}
        return {"type": name, name: grid, "uuid": self.item.uuid}


class UnfitError(Exception):
    """An answer of 200 without what is needed. ``refused``: the instance says that it has no room for it now."""

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


class Connector(Protocol):
    """``early``: the instance that answers is to be known before anything is encoded. ``pushes``: the encoder sends to
    that one by itself, so no other one can have it.
    """

    early: bool
    pushes: bool

    def asks(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        """``ec_transfer_params`` of the encode, and the name of the transfer if the router chooses it."""

    def check(self, entry: dict[str, Any]) -> None:
        """Raises UnfitError if an instance that answers could not have the item by this entry."""

    def tells(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        """``ec_transfer_params`` of the request to the instance that answers."""


@dataclass(slots=True)
class Embferry:
    early: bool = field(default=True, init=False)
    pushes: bool = field(default=False, init=False)

    def asks(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        return (None if room is None else {KEY: {"room": room}}), None

    def check(self, entry: dict[str, Any]) -> None:
        refused = entry.get(REFUSED)
        if isinstance(refused, dict):
            raise UnfitError(f"[{refused.get('code')}] {refused.get('message')}", refused=True)
        ours = entry.get(KEY)
        if not isinstance(ours, dict) or not all(isinstance(ours.get(name), kind) for name, kind in _OURS.items()):
            raise UnfitError("the answer does not say where the embedding is; is it started with EmbferryConnector?")

    def tells(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        return {one.name: one.entry for one in encoded}


@dataclass(slots=True)
class Example:
    """``ECExampleConnector``: both sides know a folder."""

    early: bool = field(default=False, init=False)
    pushes: bool = field(default=False, init=False)

    def asks(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        return None, None

    def check(self, entry: dict[str, Any]) -> None:
        """The name is enough."""

    def tells(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        return {one.name: one.entry for one in encoded}


@dataclass(slots=True)
class Mooncake:
    """``ECMooncakeConnector``: the encoder pushes to a consumer that it is told of."""

    early: bool = field(default=True, init=False)
    pushes: bool = field(default=True, init=False)

    def asks(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        assert language is not None  # early
        name = secrets.token_hex(16)
        return {"consumer_zmq": language.zmq, "ec_items": [{"transfer_id": name}]}, name

    def check(self, entry: dict[str, Any]) -> None:
        """That it arrives is between the two."""

    def tells(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        encoded = list(encoded)
        names = {one.name: one.entry.get("transfer_id") or one.transfer_id for one in encoded}
        items = [{"mm_hash": mm_hash, "transfer_id": transfer_id} for mm_hash, transfer_id in names.items()]
        return {one.name: one.entry for one in encoded} | {"ec_items": items}


CONNECTORS: dict[str, type[Embferry] | type[Example] | type[Mooncake]] = {
    "embferry": Embferry,
    "example": Example,
    "mooncake": Mooncake,
}


def _flat(value: Any) -> Iterable[Any]:
    if not isinstance(value, list):
        yield value
        return
    for inner in value:
        yield from _flat(inner)
