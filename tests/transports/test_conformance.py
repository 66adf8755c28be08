"""Every transport of the package passes the public suite: those of the table of roads by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embferry.disaggregation.base.conn_multimodal import Transport
from embferry.disaggregation.memory import MemoryTransport
from embferry.disaggregation.tcp import TcpTransport
from embferry.serve.config_roads import ROADS
from embferry.testing.conformance import TransportConformance


def roads(*, private: bool = False) -> Iterator[Any]:
    """Those that need no region that can be mapped, if ``private``."""
    for name, kind in ROADS.items():
        marks = [pytest.mark.integration] * kind.listens + [pytest.mark.engines] * kind.engine
        if not (private and kind.load().capabilities.maps_region):
            yield pytest.param(kind, id=name, marks=marks)


class TestRoad(TransportConformance):
    @pytest.fixture(autouse=True, params=roads())
    def road(self, request: pytest.FixtureRequest) -> None:
        self.kind = request.param

    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return self.kind.load()(wake)


class TestRoadPrivateRegion(TestRoad):
    shared_region = False

    @pytest.fixture(autouse=True, params=roads(private=True))
    def road(self, request: pytest.FixtureRequest) -> None:
        self.kind = request.param


class TestMemory(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return MemoryTransport(wake)


class TestMemoryPrivateRegion(TestMemory):
    shared_region = False


@pytest.mark.integration
class TestTcpIPv6(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return TcpTransport(wake, host="::1")
