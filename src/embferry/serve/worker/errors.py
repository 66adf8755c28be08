"""The errors of a worker in the one form that its callers read."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import msgspec
from starlette.responses import JSONResponse

from embferry.engine.errors import RequestError
from embferry.protocol.errors import EmbferryError
from embferry.serve.errors import ServeError
from embferry.serve.http.errors import connection_of, retry_after
from embferry.serve.json_bounds import check_values

T = TypeVar("T")
log = logging.getLogger(__name__)


def decoded(decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T], body: bytes) -> T:
    """Decodes the body of a request.

    Raises:
        ServeError: invalid_request; invalid_json.
    """
    if isinstance(decoder, msgspec.json.Decoder):
        check_values(body)
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServeError("invalid_request", f"the body is not a valid request: {error}") from error


def as_serve_error(error: BaseException) -> ServeError:
    """Returns the same error with its stable code, status and ``retryable``.

    An exception that no code expects is logged with its traceback, and becomes ``internal_error`` without details.
    """
    if isinstance(error, ServeError):
        return error
    if isinstance(error, EmbferryError):
        param = error.param if isinstance(error, RequestError) else None
        return ServeError(error.code, error.detail, param=param, status=error.http_status, retryable=error.retryable)
    log.error("a request failed because of a bug; please report it", exc_info=error)
    return ServeError("internal_error", "this worker failed on the request; its log has the details")


def error_body(error: ServeError) -> dict[str, Any]:
    """Returns OpenAI's envelope with ``status`` and ``retryable``, which the router reads."""
    return {"error": {**error.body()["error"], "status": error.http_status, "retryable": error.retryable}}


def error_response(error: ServeError) -> JSONResponse:
    """Returns the response of a worker that fails."""
    status = error.http_status
    return JSONResponse(error_body(error), status, retry_after(status, error.retry_after) | connection_of(error))
