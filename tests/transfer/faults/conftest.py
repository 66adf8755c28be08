"""Log records as text alone: the ones that pytest keeps would keep tracebacks, and with them what must be closed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest


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
