"""Requests that a language instance gets while their items are still being encoded.

The router draws the room of each item, and tells both sides at once: the encoder to offer the item there, the language
instance to ask for it there. Meanwhile that one renders and tokenizes, and the embedding goes to it as soon as it is
made. What the router had to guess for this is compared with the encoder's answer before the client gets a byte.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from embferry.models.grid_rule import GridRule, rule_in
from embferry.serve.vllm.connectors import KEY, Encoded
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.instance import Incarnation, Instance
from embferry.serve.vllm.items import Item, head_of
from embferry.serve.vllm.media_parts import Kind
from embferry.serve.vllm.picture_sizes import HEAD, picture_size

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures in a row after which a language instance gets no more requests early."""
_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change grids, and the names by which instances know items."""

T = TypeVar("T")


class NotAsExpectedError(Exception):
    """An item was encoded otherwise than a language instance was told: elsewhere, or with another grid or name."""


@dataclass(slots=True)
class Offering:
    """The common part of an encoder's answers to encodes.

    Attributes:
        shapes: By kind, the coordinates that do not depend on the item.
        rule: How its model makes grids of pictures, if it says so.
        whole: The kinds of items that language instances get themselves, because their metadata do not suffice.
    """

    shapes: dict[Kind, dict[str, Any]] = field(default_factory=dict)
    rule: GridRule | None = None
    whole: set[Kind] = field(default_factory=set)


class Offerings:
    """Knowledge about encoders, by incarnation."""

    def __init__(self) -> None:
        self._known: dict[Incarnation, Offering] = {}

    def learn(self, encoded: Encoded) -> None:
        """Learns from the answer to an encode, and removes from its entry what is meant for the router alone."""
        entry, incarnation = encoded.entry, encoded.incarnation
        rule = rule_in(entry)
        old = self._known.pop(incarnation, None)
        for other in [other for other in self._known if other[0] == incarnation[0]]:
            del self._known[other]
        if encoded.name != encoded.item.uuid or KEY not in entry:
            return
        kind, known = encoded.item.kind, Offering() if old is None else old
        shape = {name: entry[KEY][name] for name in ("endpoint", "width", "dtype")}
        is_whole = encoded.part() == encoded.item.part()
        whole = known.whole | {kind} if is_whole else known.whole
        self._known[incarnation] = Offering(known.shapes | {kind: shape}, rule or known.rule, whole)

    def expected(self, encoder: Instance, item: Item, takes_files: bool) -> Encoded | None:
        """Returns the item as the encoder will offer it in a new room, if that is known. Its digest is not.

        Args:
            encoder: the encoder.
            item: the item.
            takes_files: language instances may get files that no instance has decoded.
        """
        known = self._known.get(encoder.incarnation)
        metadata = None if known is None else _metadata(known, item, takes_files)
        if known is None or metadata is None or item.kind not in known.shapes:
            return None
        where = {**known.shapes[item.kind], "room": secrets.randbits(63), "tokens": None, "digest": None}
        return Encoded(item, encoder, encoder.incarnation, item.uuid, {"metadata": metadata, KEY: where})


def _metadata(known: Offering, item: Item, takes_files: bool) -> dict[str, Any] | None:
    """Returns the metadata of an item; empty if the language instance gets the item itself. None: they are unknown."""
    if item.kind in known.whole:
        return {} if takes_files else None
    if item.kind != "image" or known.rule is None:
        return None
    size = picture_size(head_of(item.url, HEAD))
    return None if size is None else known.rule.metadata(*size)


def is_as_expected(expected: Encoded, encoded: Encoded) -> bool:
    """Returns whether a language instance that was told the one gets the other."""
    return expected is encoded or (
        (expected.incarnation, expected.name, expected.part()) == (encoded.incarnation, encoded.name, encoded.part())
        and all(
            expected.entry[KEY][name] == encoded.entry[KEY][name] for name in ("endpoint", "room", "width", "dtype")
        )
    )


class Early:
    """Decides which requests go to a language instance early.

    Args:
        fleet: the instances.
        offerings: what is known of the encoders.
    """

    def __init__(self, fleet: Fleet, offerings: Offerings) -> None:
        self._fleet, self._offerings = fleet, offerings
        self._takes_files = fleet.settings.vllm.overlap == "all"
        self._failures: dict[Incarnation, int] = {}

    def allows(self, request: dict[str, Any], language: Instance) -> bool:
        """Returns whether this request may go to this instance early."""
        settings = self._fleet.settings.vllm
        is_plain = not any(request.get(name) for name in _OPTIONS)
        return settings.overlap != "off" and is_plain and self._failures.get(language.incarnation, 0) < MAX_FAILURES

    async def expect(
        self, items: Sequence[Item], model: str | None, avoid: Collection[str], known: dict[str, Encoded]
    ) -> dict[str, Encoded] | None:
        """Returns, by uuid, how each item will be offered, and chooses the encoders of those that are not ``known``.

        Returns:
            None if that cannot be said of all, or there is nothing to encode.
        """
        expected = dict(known)
        with ExitStack() as counted:
            for item in items:
                if item.uuid in expected:
                    continue
                encoder = await self._fleet.encoder(item.uuid, model, (), avoid)
                found = None if encoder is None else self._offerings.expected(encoder, item, self._takes_files)
                if encoder is None or found is None:
                    return None
                counted.enter_context(self._fleet.count_in_flight(encoder))  # for the choice of the next ones
                expected[item.uuid] = found
        return expected if len(expected) > len(known) else None

    def note(self, language: Instance, outcome: str) -> None:
        """Counts a request that went to a language instance early: used, unexpected or failed."""
        self._fleet.metrics.overlapped.labels(outcome).inc()
        failures = self._failures.pop(language.incarnation, 0) + 1 if outcome == "failed" else 0
        for old in [old for old in self._failures if old[0] == language.url]:
            del self._failures[old]
        if failures:
            self._failures[language.incarnation] = failures
        if failures == MAX_FAILURES:
            log.warning("%r gets requests only after their items are encoded from now on", language)


async def beside(
    asking: Coroutine[Any, Any, T],
    encodes: asyncio.Task[list[Encoded]],
    expected: Sequence[Encoded],
    on_encoded: Callable[[list[Encoded]], object],
) -> T:
    """Returns the answer, once the encodes have ended as was expected. Their failure ends the request for the answer.

    Args:
        asking: the request for the answer.
        encodes: those of all items of the request.
        expected: what the language instance was told of them.
        on_encoded: called when they have ended as expected, perhaps before there is an answer.

    Raises:
        NotAsExpectedError: they ended otherwise.
        VerbatimError, ServeError: of the encodes; or if these are well, of the request for the answer.
    """
    task = asyncio.create_task(asking)
    try:
        await asyncio.wait({task, encodes}, return_when=asyncio.FIRST_COMPLETED)
        encoded = await asyncio.shield(encodes)
        if not all(map(is_as_expected, expected, encoded)):
            raise NotAsExpectedError
        on_encoded(encoded)
        return await task
    finally:
        task.cancel()  # nothing, if it is done
        await asyncio.gather(task, return_exceptions=True)
