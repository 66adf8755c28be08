"""The parameters that vLLM's EC connectors want with an encode and with the request for the answer."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from embferry.serve.vllm.instance import Incarnation, Instance
from embferry.serve.vllm.items import Item

KEY, REFUSED = "embferry", "embferry_refused"
"""Keys in an item's entry: the coordinates of the embedding in our connector, or why it is not offered."""
_COORDINATES: dict[str, type] = {"endpoint": str, "room": int, "tokens": int, "width": int, "dtype": str}
"""The coordinates that the router reads or forwards in another form."""
_TIMES = {"timestamps", "second_per_grid_ts"}
"""Metadata with the times of a video's frames. Qwen2.5-VL's positions depend on them, and vLLM 0.32 publishes the grid
alone: an answer to the grid would be an answer to another video."""


@dataclass(slots=True)
class Encoded:
    """An item that an instance has encoded.

    Attributes:
        incarnation: the instance's, when it encoded.
        name: the instance's name for the item: its ``uuid``, or a digest over it.
        entry: the item's entry in the response: ``metadata`` and the coordinates.
        transfer_id: the transfer's name where the router chooses it.
        repeated: the item was encoded for an earlier request. If its coordinates have no endpoint, the language
            instance has received it and no encoder offers it.
        by_prefix: that instance may have no embedding of the item; its prefix cache may cover it.
    """

    item: Item
    encoder: Instance
    incarnation: Incarnation
    name: str
    entry: dict[str, Any]
    transfer_id: str | None = None
    repeated: bool = False
    by_prefix: bool = False

    def part(self) -> dict[str, Any]:
        """Returns the item as a part of the message for a language instance: its grid and its name.

        Where the metadata do not describe the item completely, the part has the media itself; the embedding still
        comes through the connector.
        """
        metadata = self.entry.get("metadata") or {}
        if not metadata or (self.item.kind == "video" and not _TIMES & metadata.keys()):
            return self.item.part()
        name = f"{self.item.kind}_embeds"
        grid = {key: list(_flat(value)) for key, value in metadata.items()}
        return {"type": name, name: grid, "uuid": self.item.uuid}


class UnusableResponseError(Exception):
    """A response from an encoder without the embedding's entry.

    Attributes:
        is_capacity: the instance has no capacity for the item now.
    """

    def __init__(self, why: str, *, is_capacity: bool = False) -> None:
        super().__init__(why)
        self.is_capacity = is_capacity


class Connector:
    """An EC connector. The base class does for those that need no parameters.

    Attributes:
        needs_language: the language instance has to be known before anything is encoded.
        pushes: the encoder sends the embedding to that language instance, so no other one can have it.
    """

    needs_language: ClassVar[bool] = False
    pushes: ClassVar[bool] = False

    def encode_params(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        """Returns ``ec_transfer_params`` of the encode, and the transfer's name if the router chooses it."""
        return None, None

    def check(self, entry: dict[str, Any]) -> None:
        """Raises UnusableResponseError if a language instance could not get the item by this entry."""

    def answer_params(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        """Returns ``ec_transfer_params`` of the request to the language instance."""
        return {one.name: one.entry for one in encoded}


class EmbferryConnector(Connector):
    """This project's connector."""

    needs_language = True

    def encode_params(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        return (None if room is None else {KEY: {"room": room}}), None

    def check(self, entry: dict[str, Any]) -> None:
        refused = entry.get(REFUSED)
        if isinstance(refused, dict):
            raise UnusableResponseError(f"[{refused.get('code')}] {refused.get('message')}", is_capacity=True)
        ours = entry.get(KEY)
        if not isinstance(ours, dict) or not all(
            isinstance(ours.get(key), type_) for key, type_ in _COORDINATES.items()
        ):
            why = "the answer does not say where the embedding is; is the instance started with EmbferryConnector?"
            raise UnusableResponseError(why)


class ExampleConnector(Connector):
    """``ECExampleConnector``: both sides share a folder, and an item's name is enough."""


class MooncakeConnector(Connector):
    """``ECMooncakeConnector``: the encoder pushes to the consumer that its request names."""

    needs_language = True
    pushes = True

    def encode_params(self, language: Instance | None, room: int | None) -> tuple[dict[str, Any] | None, str | None]:
        assert language is not None  # needs_language
        name = secrets.token_hex(16)
        return {"consumer_zmq": language.zmq, "ec_items": [{"transfer_id": name}]}, name

    def answer_params(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        encoded = list(encoded)
        names = {one.name: one.entry.get("transfer_id") or one.transfer_id for one in encoded}
        items = [{"mm_hash": mm_hash, "transfer_id": transfer_id} for mm_hash, transfer_id in names.items()]
        return super().answer_params(encoded) | {"ec_items": items}


CONNECTORS: dict[str, type[Connector]] = {
    "embferry": EmbferryConnector,
    "example": ExampleConnector,
    "mooncake": MooncakeConnector,
}


def _flat(value: Any) -> Iterable[Any]:
    """Yields the values of nested lists in their order. The depth is the encoder's choice."""
    left = [value]
    while left:
        if isinstance(one := left.pop(), list):
            left += reversed(one)
        else:
            yield one
