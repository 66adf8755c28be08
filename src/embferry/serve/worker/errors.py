"""Whatever goes wrong in a worker, as the one error its callers know."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from embferry.engine.errors import EngineError
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.errors import ServeError

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = "1"


def as_serve_error(error: BaseException) -> ServeError:
    """The same error with its stable code, status and ``retryable``.

    One nobody foresaw is logged with its traceback, and told to the caller without it.
    """
    if isinstance(error, ServeError):
        return error
    if isinstance(error, EmbeddingTransferError):
        return ServeError(error.code, error.detail, status=error.http_status, retryable=error.retryable)
    if isinstance(error, EngineError):
        return ServeError(error.code, str(error), status=error.http_status, retryable=error.retryable)
    log.error("a request failed by a fault of ours; report this as a bug", exc_info=error)
    return ServeError("internal_error", "something went wrong in this worker; its log has the details")


def error_body(error: ServeError) -> dict[str, Any]:
    """OpenAI's envelope, with what a router needs to know beside it: ``status`` and ``retryable``."""
    return {"error": {**error.body()["error"], "status": error.status, "retryable": error.retryable}}


def error_response(error: ServeError) -> JSONResponse:
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if error.status == 503 else {}
    return JSONResponse(error_body(error), error.status, headers)
