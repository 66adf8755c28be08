"""A producer and a consumer beside an undivided engine: three processes, with one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engines import Content, Engine, reference

TEXT = {"type": "text", "text": "What is this?"}
POOL_TOKENS = 32
POOL = {"num_blocks": 4, "block_size": 8}
"""Smaller than any picture here: of 48 tokens, or 1,024."""


def transfer(role: str, **extra: Any) -> dict[str, Any]:
    """``ec_transfer_config``; ``extra``: more of the connector's settings."""
    return {
        "ec_connector": "EmbferryConnector",
        "ec_connector_module_path": "embferry.connectors.vllm.connector",
        "ec_role": role,
        "ec_connector_extra_config": POOL | extra,
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
        """What the consumer is asked."""
        by_uuid = {item["uuid"]: params[next(key for key in params if item["uuid"] in key)] for item in items}
        return [*(reference(item, by_uuid[item["uuid"]]) for item in items), TEXT]

    def settled(self, seconds: float = 5) -> bool:
        """Whether every block of the consumer's pool is free, at once or soon."""
        deadline = time.monotonic() + seconds
        while not (whole := self.consumer.look()["whole"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(whole)

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
    """All three, started at once.

    :param make: writes the model.
    :param producer, consumer: more options of that engine; ``options``: of all.
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
    """Of each item's coordinates, some are something else."""
    return {key: entry | {"embferry": entry["embferry"] | changes} for key, entry in params.items()}
