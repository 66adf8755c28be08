"""The errors of a worker in the one form that its callers read."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from embferry.engine.errors import EngineError
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.errors import ServeError
from embferry.serve.http.errors import RETRY_AFTER_SECONDS

log = logging.getLogger(__name__)


def as_serve_error(error: BaseException) -> ServeError:
    """Returns the same error with its stable code, status and ``retryable``.

    An exception that no code expects is logged with its traceback, and becomes ``internal_error`` without details.
    """
    if isinstance(error, ServeError):
        return error
    if isinstance(error, EmbeddingTransferError):
        return ServeError(error.code, error.detail, status=error.http_status, retryable=error.retryable)
    if isinstance(error, EngineError):
        return ServeError(error.code, str(error), status=error.http_status, retryable=error.retryable)
    log.error("a request failed because of a bug; please report it", exc_info=error)
    return ServeError("internal_error", "this worker failed on the request; its log has the details")


def error_body(error: ServeError) -> dict[str, Any]:
    """Returns OpenAI's envelope with ``status`` and ``retryable``, which the router reads."""
    return {"error": {**error.body()["error"], "status": error.status, "retryable": error.retryable}}


def error_response(error: ServeError) -> JSONResponse:
    """Returns the response of a worker that fails."""
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if error.status == 503 else {}
    return JSONResponse(error_body(error), error.status, headers)
