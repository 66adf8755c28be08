"""The plug-in's part of an encoder: its managers, and the parts that it sends."""

from __future__ import annotations

import msgspec

from embferry import Layout, SendManager
from embferry.transfer.failures import attempt

from ..shared.counters import Counters, MetricsServer
from ..shared.managers import Managers
from ..shared.shape import Shape
from .encoders import VERSION, Description
from .outgoing import OutgoingParts
from .parts import EncoderInfo
from .settings import PluginSettings


class EncoderSide:
    """One encoder of SGLang. Its event loop calls the methods.

    Args:
        settings: The settings.
        kinds: For each kind of media, the elements per token.
        dtype: Name of the elements' type, such as "bfloat16".

    Attributes:
        parts: The parts that it sends.

    Raises:
        TransportError: A transport or an address is not available.
    """

    def __init__(self, settings: PluginSettings, kinds: dict[str, int], dtype: str) -> None:
        self._settings, self._kinds, self._dtype = settings, kinds, dtype
        self.counters = Counters()
        self._managers: Managers[SendManager] = Managers(self._new_manager, self.counters)
        self.parts = OutgoingParts(self._managers, self.counters)
        self.counters.add_gauge("offered_bytes", self.parts.held_bytes)
        self._metrics = None
        self.describe()  # listens now, and not with the first request
        if settings.metrics_port is not None:
            self._metrics = MetricsServer(self.counters, settings.host, settings.metrics_port)

    def describe(self) -> bytes:
        """Returns what the encoder says of itself, as JSON."""
        kinds = {}
        for kind, width in self._kinds.items():
            manager = self._managers.get(Shape(1, width, self._dtype).layout)
            kinds[kind] = EncoderInfo(manager.endpoint, self._dtype, width)
        return msgspec.json.encode(Description(VERSION, kinds))

    def close(self) -> None:
        """Ends every transfer."""
        attempt(self.parts.close)
        if self._metrics is not None:
            attempt(self._metrics.close)

    def _new_manager(self, layout: Layout) -> SendManager:
        settings = self._settings
        return SendManager(
            layout,
            settings.make_transports(),
            host=settings.host,
            advertise=settings.advertise,
            settings=settings.sending,
            trust=settings.trust,
        )
