"""Log lines on stderr, plain or as JSON, with the ids of the request and the room that they are about."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from embferry.observe.foreign_lines import Capture, level_of
from embferry.observe.log_queue import QueueHandler
from embferry.observe.uncaught import log_uncaught
from embferry.protocol.text import MAX_DETAIL, printable, shown

STDOUT, STDERR = 1, 2
"""The descriptors of standard output and standard error."""
MAX_ROOMS = 10_000
"""Rooms whose requests are remembered."""
_REQUEST: ContextVar[str | None] = ContextVar("request_id", default=None)
_ROOM: ContextVar[int | None] = ContextVar("room", default=None)

_NO_EXTRAS = {"message", "asctime", "request_id", "room", "worker", "taskName", "color_message", "short"}
_MAX_TRACE = 1 << 16
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | _NO_EXTRAS


@dataclass(slots=True)
class _Process:
    """The facts about this process that each of its lines has.

    Attributes:
        name: ``encode-0``, for example.
        worker: the id under which a worker has registered.
        style: of the lines.
        is_owned: all that it writes is ours, so that it may become lines of the log.
        capture: makes lines of all else that goes to standard error.
    """

    name: str = "python"
    worker: str | None = None
    style: str = "plain"
    is_owned: bool = False
    capture: Capture | None = None


_process = _Process()
_rooms: OrderedDict[int, str] = OrderedDict()  # the request of each room, the latest last
_rooms_lock = threading.Lock()


@contextlib.contextmanager
def about(request_id: str | None = None, room: int | None = None) -> Iterator[None]:
    """Adds ids to the log lines of a block of code and of the tasks that it starts.

    Lines about the room from elsewhere, such as the threads of a transfer, have the id of its request from then on.

    Args:
        request_id: The id of the request; None keeps the one of the enclosing block.
        room: The room; None keeps the one of the enclosing block.
    """
    ids: list[tuple[ContextVar[Any], object]] = [(_REQUEST, request_id), (_ROOM, room)]
    tokens = [(var, var.set(value)) for var, value in ids if value is not None]
    _remember(_ROOM.get(), _REQUEST.get())
    try:
        yield
    finally:
        for var, token in reversed(tokens):
            var.reset(token)


def _remember(room: int | None, request_id: str | None) -> None:
    if room is None or request_id is None:
        return
    with _rooms_lock:
        _rooms[room] = request_id
        _rooms.move_to_end(room)
        if len(_rooms) > MAX_ROOMS:
            _rooms.popitem(last=False)


def own_process() -> None:
    """Has uncaught exceptions logged, and, where lines are JSON, all else that this process and its children write.

    For the main programs alone: in a test, or in a program that imports this one, others write to standard error too.
    """
    _process.is_owned = True
    log_uncaught()
    logging.captureWarnings(True)


def configure(level: str, style: str, process: str = "") -> None:
    """Sends all log lines of the process to stderr. A further call replaces the previous configuration.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "plain" or "json".
        process: the name of this process in its lines; the last one stays if it is empty.
    """
    _process.name, _process.style = process or _process.name, style
    if style == "json" and _process.is_owned and _process.capture is None:
        _process.capture = Capture((STDOUT, STDERR), _log_foreign)
        atexit.register(_process.capture.end)
    target = _handler()
    target.setFormatter(_Json() if style == "json" else _Plain(os.isatty(STDERR), is_colourful(STDERR)))
    target.addFilter(_mark)
    logging.basicConfig(level=level.upper(), handlers=[target], force=True)
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "PIL", "libav", "uvicorn"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def set_worker(worker: str) -> None:
    """Adds the id of the worker that this process is to its lines."""
    _process.worker = worker


def log_fd() -> int:
    """Returns the descriptor of the log, for a child whose lines go to the same place as they are."""
    return STDERR if _process.capture is None else _process.capture.kept


def flush() -> None:
    """Writes the last lines, in a process that is about to end without the interpreter's own end."""
    if _process.capture is not None:
        _process.capture.end()
    logging.shutdown()


def is_json() -> bool:
    """Returns whether lines are JSON, so that nothing else may be written to standard error."""
    return _process.style == "json"


def is_colourful(fd: int) -> bool:
    """Returns whether a descriptor is a terminal that shows colours, and the user has not refused them (NO_COLOR)."""
    return os.isatty(fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def _log_foreign(line: str) -> None:
    logging.getLogger("stderr").log(level_of(line), "%s", line)


def dropped_lines() -> int:
    """Returns the log lines of this process that were dropped, because the log was not read."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, QueueHandler))


def _handler() -> logging.Handler:
    """Returns a handler that never blocks; one for ``sys.stderr`` itself if that is no file, as in tests."""
    if _process.capture is not None:
        return QueueHandler(_process.capture.kept)
    try:
        is_file = sys.stderr.fileno() == STDERR
    except (OSError, ValueError, AttributeError):
        is_file = False
    return QueueHandler(STDERR) if is_file else logging.StreamHandler(sys.stderr)


def _mark(record: logging.LogRecord) -> bool:
    """Adds the ids of the context and of the worker to a record, unless ``extra=`` gave others."""
    facts = record.__dict__
    room: int | None = facts.setdefault("room", _ROOM.get())
    request_id = _REQUEST.get()
    if request_id is None and room is not None:
        request_id = _rooms.get(room)
    facts.setdefault("request_id", request_id)
    facts.setdefault("worker", _process.worker)
    return True


def _extras(record: logging.LogRecord) -> dict[str, object]:
    found = {key: value for key, value in vars(record).items() if key not in _STANDARD and key[0] != "_"}
    return {key: _bounded(value) for key, value in found.items()}


def _bounded(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    is_sound = value is None or isinstance(value, int | float) or len(str(value)) <= MAX_DETAIL
    return value if is_sound else shown(value, MAX_DETAIL)


def _message(record: logging.LogRecord) -> str:
    """Returns the message on one line: it may repeat what clients have sent."""
    return printable(record.getMessage(), 2 * MAX_DETAIL)


def _quoted(value: str) -> str:
    """Returns a value of a plain line, as a JSON string where its end would otherwise be unclear."""
    return value if value and not re.search(r"[\s\"=]", value) else json.dumps(value, ensure_ascii=False)


class _Plain(logging.Formatter):
    """One line a record, and the lines of a traceback below it, indented.

    Lines on a terminal are for a reader who watches: they have whole seconds, and neither pid nor the logger's name. A
    record with the extra ``short`` shows that there, in place of its message and facts.
    """

    def __init__(self, is_terminal: bool = False, is_colourful: bool = False) -> None:
        super().__init__()
        self._is_terminal, self._is_colourful = is_terminal, is_colourful

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")
        level, message, tail = f"{record.levelname.lower():7}", _message(record), self._tail(record)
        if self._is_terminal and (short := getattr(record, "short", None)) is not None:
            message, tail = printable(str(short)), ""
        if not self._is_terminal:
            line = f"{when[:-3]} {level} {_process.name}[{record.process}] {record.name}: {message}{tail}"
        elif not self._is_colourful:
            line = f"{when[:8]} {level} {_process.name}: {message}{tail}"
        else:
            colour = _COLOURS.get(record.levelno, "")
            line = f"{_DIM}{when[:8]}{_RESET} {colour}{level}{_RESET} {_process.name}: "
            line += f"{colour}{message}{_RESET}{_DIM}{tail}{_RESET}"
        if not record.exc_info:
            return line
        # Indented, so that no line of it looks like a log line.
        trace = [printable(traced) for traced in self.formatException(record.exc_info)[:_MAX_TRACE].split("\n")]
        return "\n  ".join([line, *trace])

    def _tail(self, record: logging.LogRecord) -> str:
        """Returns the facts that come after the message."""
        worker = getattr(record, "worker", None)
        facts = {
            "request": getattr(record, "request_id", None),
            "room": getattr(record, "room", None),
            "worker": None if worker == _process.worker else worker,  # one that this line is about
        }
        facts = {key: value for key, value in facts.items() if value is not None} | _extras(record)
        return "".join(f" {key}={_quoted(printable(str(value)))}" for key, value in facts.items())


_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[1;31m"}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": _process.name,
            "pid": record.process,
            "worker": getattr(record, "worker", None),
            "logger": record.name,
            "message": _message(record),
            "request_id": getattr(record, "request_id", None),
            "room": getattr(record, "room", None),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[:_MAX_TRACE]
        return json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False, default=str)
