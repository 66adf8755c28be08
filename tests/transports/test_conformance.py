"""Every transport of the package passes the public suite."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from embferry.disaggregation.base.conn_multimodal import Transport
from embferry.disaggregation.memory import MemoryTransport
from embferry.disaggregation.shm import ShmTransport
from embferry.disaggregation.tcp import TcpTransport
from embferry.testing.conformance import TransportConformance


class TestMemory(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return MemoryTransport(wake)


class TestMemoryPrivateRegion(TestMemory):
    shared_region = False


class TestShm(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return ShmTransport(wake)


@pytest.mark.integration
class TestTcp(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return TcpTransport(wake)


@pytest.mark.integration
class TestTcpPrivateRegion(TestTcp):
    shared_region = False


@pytest.mark.integration
class TestTcpIPv6(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return TcpTransport(wake, host="::1")
