"""One instance of vLLM, as the router sees it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, Literal

from embferry.serve.config import VllmSettings

Role = Literal["encode", "language", "prefill", "decode"]
MAX_REMEMBERED = 20_000
"""Items that are remembered as encoded by an instance."""

Incarnation = tuple[str, int]
"""URL and number of starts: an instance that was started again may be tried again."""


class Instance:
    """One ``vllm serve``.

    Attributes:
        zmq: the control address of its Mooncake connector, if it has one.
        connector_metrics: the base URL of the metrics of its connector, if it is known.
        trouble: why it is not up.
        unfit: why it encodes nothing although it is up; see :mod:`.fitness`.
        models: OpenAI's model objects by name, as its ``/v1/models`` lists them.
        encoded: the items that it has encoded, the latest last.
        probing: held while a probe runs.
        suspected: set to have it probed at once.
        is_stalled: it accepts connections, or seems to, and has not answered the last probe in time.
        waiting: the time-outs of what waits for it, which expire when it stalls.
    """

    def __init__(self, role: Role, url: str, zmq: str | None = None) -> None:
        self.role = role
        self.url = url.rstrip("/")
        self.zmq = zmq
        self.connector_metrics: str | None = None
        self.up = False
        self.trouble = "has not been asked yet"
        self.unfit = ""
        self.models: dict[str, dict[str, Any]] = {}
        self.starts = 0
        self.encoded: OrderedDict[str, None] = OrderedDict()
        self.probing = asyncio.Lock()
        self.suspected = asyncio.Event()
        self.is_stalled = False
        self.waiting: set[asyncio.Timeout] = set()

    @property
    def incarnation(self) -> Incarnation:
        """The instance between two of its starts."""
        return self.url, self.starts

    def set_stalled(self) -> None:
        """Ends everything that waits for the instance."""
        self.is_stalled = True
        for limit in self.waiting:
            limit.reschedule(0)
        self.waiting.clear()

    def remember(self, uuid: str) -> None:
        """Remembers that the instance has encoded this item."""
        self.encoded[uuid] = None
        self.encoded.move_to_end(uuid)
        if len(self.encoded) > MAX_REMEMBERED:
            self.encoded.popitem(last=False)

    def __repr__(self) -> str:
        return f"the {self.role} instance at {self.url}"


def named_in(settings: VllmSettings) -> dict[Role, list[Instance]]:
    """Returns the instances that the settings name, by role: encode, receive embeddings, decode."""
    receiving: Role = "prefill" if settings.prefill_urls else "language"
    urls = settings.prefill_urls or settings.language_urls
    zmq = settings.consumer_zmq or (None,) * len(urls)
    found: dict[Role, list[Instance]] = {
        "encode": [Instance("encode", url) for url in settings.encode_urls],
        receiving: [Instance(receiving, url, address) for url, address in zip(urls, zmq, strict=True)],
        "decode": [Instance("decode", url) for url in settings.decode_urls],
    }
    instances = [one for role in found.values() for one in role]
    for one, metrics in zip(instances, settings.connector_metrics_urls, strict=False):
        one.connector_metrics = metrics
    return found
