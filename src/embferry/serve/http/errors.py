"""Exceptions as error responses in OpenAI's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from embferry.serve.errors import ServeError

MAX_PATH = 300
"""Characters of a path in an error."""
RETRIED_BY_CLIENTS = (408, 409, 429)
"""The statuses below 500 with which OpenAI's clients repeat a request, unless ``x-should-retry`` says otherwise."""


def error_response(error: ServeError) -> JSONResponse:
    """Returns the response that a router's client gets.

    OpenAI's clients obey ``x-should-retry`` where it is present.
    """
    status = error.http_status
    is_told = status >= 500 or status in RETRIED_BY_CLIENTS or error.retryable
    headers = {"x-should-retry": "true" if error.retryable else "false"} if is_told else {}
    headers |= retry_after(status, error.retry_after, retryable=error.retryable) | connection_of(error)
    return JSONResponse(error.body(), status, headers)


def retry_after(status: int, seconds: int = 1, *, retryable: bool = False) -> dict[str, str]:
    """Returns the header that goes with every response of this status: 503 and 429 have one.

    So has a gateway's failure that is ``retryable``: another worker, or the restarted one, may answer.
    """
    return {"retry-after": str(seconds)} if status in (429, 503) or (retryable and status >= 500) else {}


def connection_of(error: ServeError) -> dict[str, str]:
    """Returns the header that closes the connection after a damaged request: its length may be wrong too."""
    return {"connection": "close"} if error.code == "body_damaged" else {}


def exception_handlers(
    respond: Callable[[ServeError], Response],
    convert: Callable[[Exception], ServeError] | None = None,
    kinds: Sequence[type[Exception]] = (),
    paths: Sequence[str] = (),
) -> dict[Any, Any]:
    """Returns Starlette's ``exception_handlers``, so that every exception becomes an error response.

    Args:
        respond: makes the response.
        convert: turns any other exception into a ServeError; ``internal_error`` if None.
        kinds: exceptions that are expected, beside ServeError. Starlette raises others again after the response, so
            that uvicorn logs them.
        paths: what is served, for requests to other paths.
    """
    convert = convert or _as_internal_error

    async def failed(request: Request, error: Exception) -> Response:
        return respond(error if isinstance(error, ServeError) else convert(error))

    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        path = request.url.path if len(request.url.path) <= MAX_PATH else request.url.path[:MAX_PATH] + "…"
        message = f"{request.method} {path}: {error.detail}"
        if allowed := (error.headers or {}).get("Allow"):
            message += f"; the path accepts {', '.join(sorted(allowed.split(', ')))}"
        if code == "not_found" and paths:
            message += f"; there are {', '.join(paths)}"
        response = respond(ServeError(code, message, status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    return {HTTPException: http_error, **dict.fromkeys((ServeError, *kinds, Exception), failed)}


def _as_internal_error(_: Exception) -> ServeError:
    """Returns an error without details, which must not reach clients; uvicorn logs the traceback."""
    return ServeError("internal_error", "the server failed on this request; the log has the details")
