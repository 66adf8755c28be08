"""Encode instances that fail every encode: they are passed over until they encode the router's own picture.

An instance answers probes of its health although its encodes fail: vLLM looks at its engine, not at what comes out.
After ``MOST_FAULTS`` failures in a row, of any items, the router has the instance encode a tiny picture of its own. If
that fails too, the instance is unfit: it is asked last, and it gets the picture again until it encodes it. An instance
that is busy, or that refuses a damaged file, has not failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from embferry.serve.vllm.instance import Incarnation, Instance

log = logging.getLogger(__name__)

MOST_FAULTS = 3
AGAIN_SECONDS = 5.0
"""Time between two tests of an unfit instance."""

Test = Callable[[Instance], Awaitable[str]]
"""Has an instance encode the router's picture; returns why it failed, or an empty text."""


class Fitness:
    """The faults of encode instances in a row.

    Args:
        test: awaited for an instance that may be unfit.
    """

    def __init__(self, test: Test) -> None:
        self._test = test
        self._faults: dict[str, tuple[Incarnation, int]] = {}  # by URL
        self._testing: dict[str, asyncio.Task[None]] = {}

    def encoded(self, instance: Instance) -> None:
        """Notes that an instance has encoded an item."""
        self._faults.pop(instance.url, None)
        instance.unfit = ""

    def failed(self, instance: Instance) -> None:
        """Notes that an instance has failed to encode an item, and tests it if that happens too often."""
        known, count = self._faults.get(instance.url, (instance.incarnation, 0))
        count = count + 1 if known == instance.incarnation else 1
        self._faults[instance.url] = instance.incarnation, count
        if count >= MOST_FAULTS and instance.url not in self._testing:
            task = self._testing[instance.url] = asyncio.create_task(self._keep_testing(instance))
            task.add_done_callback(lambda _: self._testing.pop(instance.url, None))

    async def close(self) -> None:
        """Ends the tests."""
        tasks = list(self._testing.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _keep_testing(self, instance: Instance) -> None:
        """Tests an instance until it encodes, or is started again."""
        incarnation = instance.incarnation
        while instance.incarnation == incarnation and (why := await self._test(instance)):
            if not instance.unfit:
                log.warning("%r is passed over until it encodes the router's own picture: %s", instance, why)
            instance.unfit = why
            await asyncio.sleep(AGAIN_SECONDS)
        if instance.unfit:
            log.info("%r encodes again", instance)
        self._faults.pop(instance.url, None)
        instance.unfit = ""
