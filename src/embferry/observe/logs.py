"""Log lines on stderr, plain or as JSON, with the ids of the request and the room that they are about."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from embferry.observe.log_queue import QueueHandler
from embferry.protocol.text import MAX_DETAIL, printable, shown

STDERR = 2
"""The descriptor of standard error."""
_REQUEST: ContextVar[str | None] = ContextVar("request_id", default=None)
_ROOM: ContextVar[int | None] = ContextVar("room", default=None)

_NO_EXTRAS = {"message", "asctime", "request_id", "room", "taskName", "color_message"}
_MAX_TRACE = 1 << 16
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | _NO_EXTRAS


@contextlib.contextmanager
def about(request_id: str | None = None, room: int | None = None) -> Iterator[None]:
    """Adds ids to the log lines of a block of code and of the tasks that it starts.

    Args:
        request_id: The id of the request; None keeps the one of the enclosing block.
        room: The room; None keeps the one of the enclosing block.
    """
    ids: list[tuple[ContextVar[Any], object]] = [(_REQUEST, request_id), (_ROOM, room)]
    tokens = [(var, var.set(value)) for var, value in ids if value is not None]
    try:
        yield
    finally:
        for var, token in reversed(tokens):
            var.reset(token)


def configure(level: str, style: str) -> None:
    """Sends all log lines of the process to stderr. A further call replaces the previous configuration.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "plain" or "json".
    """
    target = _handler()
    target.setFormatter(_Json() if style == "json" else _Plain())
    target.addFilter(_mark)
    logging.basicConfig(level=level.upper(), handlers=[target], force=True)
    for chatty in ("httpx", "httpcore", "PIL", "libav", "uvicorn"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def dropped_lines() -> int:
    """Returns the log lines of this process that were dropped, because the log was not read."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, QueueHandler))


def _handler() -> logging.Handler:
    """Returns a handler that never blocks; one for ``sys.stderr`` itself if that is no file, as in tests."""
    try:
        is_file = sys.stderr.fileno() == STDERR
    except (OSError, ValueError, AttributeError):
        is_file = False
    return QueueHandler(STDERR) if is_file else logging.StreamHandler(sys.stderr)


def _mark(record: logging.LogRecord) -> bool:
    """Adds the ids of the context to a record, unless ``extra=`` gave others."""
    record.__dict__.setdefault("request_id", _REQUEST.get())
    record.__dict__.setdefault("room", _ROOM.get())
    return True


def _extras(record: logging.LogRecord) -> dict[str, object]:
    found = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    return {key: _bounded(value) for key, value in found.items()}


def _bounded(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    is_sound = value is None or isinstance(value, int | float) or len(str(value)) <= MAX_DETAIL
    return value if is_sound else shown(value, MAX_DETAIL)


def _message(record: logging.LogRecord) -> str:
    """Returns the message on one line: it may repeat what clients have sent."""
    return printable(record.getMessage(), 2 * MAX_DETAIL)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        known = {"request": getattr(record, "request_id", None), "room": getattr(record, "room", None)}
        facts = {**{k: v for k, v in known.items() if v is not None}, **_extras(record)}
        tail = "".join(f" {key}={printable(str(value))}" for key, value in facts.items())
        line = f"{when} {record.levelname.lower():7} {record.name}: {_message(record)}{tail}"
        if not record.exc_info:
            return line
        # Indented, so that no line of it looks like a log line.
        trace = [printable(traced) for traced in self.formatException(record.exc_info)[:_MAX_TRACE].split("\n")]
        return "\n  ".join([line, *trace])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            "request_id": getattr(record, "request_id", None),
            "room": getattr(record, "room", None),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[:_MAX_TRACE]
        return json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False, default=str)
