"""A pair of managers, and log records as text alone: with their tracebacks they would keep what must be closed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from embferry import ReceiveManager, SendManager
from embferry.protocol.layout import Geometry
from embferry.transports.in_memory.transport import InMemoryTransport

from ..conftest import LAYOUT, Pair


@pytest.fixture(autouse=True)
def log_as_text() -> Iterator[None]:
    make, formatter = logging.getLogRecordFactory(), logging.Formatter()

    def as_text(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record = make(*arguments, **keywords)
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text, record.exc_info = formatter.formatException(record.exc_info), None
        return record

    logging.setLogRecordFactory(as_text)
    yield
    logging.setLogRecordFactory(make)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Yields two managers, and checks that both still work after the test."""
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()])
    pair = Pair(receiving, SendManager(LAYOUT, [InMemoryTransport()]), InMemoryTransport)
    yield pair
    for manager in (pair.sending, *pair.extra, pair.receiving):
        assert manager.fault is None
        manager.close()
