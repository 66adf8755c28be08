"""Uncaught exceptions as lines of the log, with their tracebacks; as Python writes them while there is no log yet."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType

from embferry.protocol.text import shown

log = logging.getLogger("python")


def log_uncaught() -> None:
    """Has them logged from now on: of the main thread, of other threads, and those that Python ignores."""
    sys.excepthook = _in_main_thread
    threading.excepthook = _in_thread
    sys.unraisablehook = _ignored


def _in_main_thread(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) or not logging.getLogger().handlers:
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("uncaught: %s", shown(error), exc_info=(kind, error, trace))


def _in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or not logging.getLogger().handlers:
        threading.__excepthook__(args)
        return
    name = args.thread.name if args.thread is not None else "a thread"
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    log.critical("uncaught in %s: %s", name, shown(args.exc_value), exc_info=trace)


def _ignored(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value is None or not logging.getLogger().handlers:
        sys.__unraisablehook__(args)
        return
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    log.error("ignored in %s: %s", shown(args.object), shown(args.exc_value), exc_info=trace)
