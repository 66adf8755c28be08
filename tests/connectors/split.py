"""A producer and a consumer beside an undivided engine: three processes with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engines import Content, Engine, reference
from .pair import until

TEXT = {"type": "text", "text": "What is this?"}
POOL_TOKENS = 32
POOL = {"num_blocks": 4, "block_size": 8}
"""Smaller than any embedding in these tests, which have 48 or 1,024 tokens."""
PEER_TIMEOUT = 5.0
"""Long enough that a busy machine does not make a producer look lost."""


def transfer(role: str, **extra: Any) -> dict[str, Any]:
    """Returns an ``ec_transfer_config``. ``extra`` has further settings of the connector."""
    return {
        "ec_connector": "EmbferryConnector",
        "ec_connector_module_path": "embferry.connectors.vllm.connector",
        "ec_role": role,
        "ec_connector_extra_config": POOL | {"peer_timeout": PEER_TIMEOUT} | extra,
    }


@dataclass
class Engines:
    model: Path
    producer: Engine
    consumer: Engine
    undivided: Engine

    def split(self, *items: Content) -> dict[str, Any]:
        return self.answer(self.encode(*items), *items)

    def encode(self, *items: Content) -> dict[str, Any]:
        params: dict[str, Any] = self.producer.ask(*items)["params"]
        assert len(params) == len({item["uuid"] for item in items})
        return params

    def answer(self, params: dict[str, Any], *items: Content) -> dict[str, Any]:
        return self.consumer.ask(*self.message(params, *items), params=params)

    def message(self, params: dict[str, Any], *items: Content) -> list[Content]:
        """Returns the message for the consumer."""
        by_uuid = {item["uuid"]: params[next(key for key in params if item["uuid"] in key)] for item in items}
        return [*(reference(item, by_uuid[item["uuid"]]) for item in items), TEXT]

    def wait_until_settled(self) -> None:
        """Waits until every block of the consumer's pool is free."""
        until(lambda: self.consumer.refresh()["whole"])

    def whole(self, *items: Content) -> dict[str, Any]:
        return self.undivided.ask(*items, TEXT)


@contextmanager
def running(
    folder: Path,
    make: Callable[[Path], None],
    transports: Sequence[str],
    *,
    producer: dict[str, Any] | None = None,
    consumer: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Engines]:
    """Starts all three at once.

    Args:
        folder: For the model and the logs.
        make: Writes the model into a folder.
        transports: Names of the connector's transports.
        producer: Further options of the producer.
        consumer: Further options of the consumer.
        options: Options of all three.
    """
    make(folder / "model")
    given = {"producer": (producer or {}), "consumer": (consumer or {})}
    parts = {
        name: Engine(
            folder / "model", folder / f"{name}.log", transfer(f"ec_{name}", transports=transports), **options | more
        )
        for name, more in given.items()
    }
    parts["undivided"] = Engine(folder / "model", folder / "undivided.log", **options)
    made = Engines(folder / "model", **parts)
    try:
        for engine in parts.values():
            engine.started()
        yield made
    finally:
        last = (made.producer, made.consumer, made.undivided)
        for engine in last:
            engine.end()
        for engine in last:
            engine.close()


def broken(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns the parameters with changes in each item's coordinates."""
    return {key: entry | {"embferry": entry["embferry"] | changes} for key, entry in params.items()}
