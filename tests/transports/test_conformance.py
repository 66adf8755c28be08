"""Every transport of the package passes the public suite. Those of the registry are found there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embferry.testing.conformance import TransportConformance
from embferry.transports.contract import Transport
from embferry.transports.in_memory import InMemoryTransport
from embferry.transports.registry import TRANSPORTS
from embferry.transports.tcp import TcpTransport


def make_transports(*, private: bool = False) -> Iterator[Any]:
    """Yields a parameter for each transport of the registry; if ``private``, for those that work on private memory."""
    for name, kind in TRANSPORTS.items():
        marks = [pytest.mark.integration] * kind.listens + [pytest.mark.engines] * kind.needs_engine
        if not (private and kind.load().capabilities.maps_region):
            yield pytest.param(kind, id=name, marks=marks)


class TestTransport(TransportConformance):
    @pytest.fixture(autouse=True, params=make_transports())
    def transport(self, request: pytest.FixtureRequest) -> None:
        self.kind = request.param

    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return self.kind.load()(wake)


class TestTransportPrivateRegion(TestTransport):
    shared_region = False

    @pytest.fixture(autouse=True, params=make_transports(private=True))
    def transport(self, request: pytest.FixtureRequest) -> None:
        self.kind = request.param


class TestMemory(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return InMemoryTransport(wake)


class TestMemoryPrivateRegion(TestMemory):
    shared_region = False


@pytest.mark.integration
class TestTcpIPv6(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return TcpTransport(wake, host="::1")
