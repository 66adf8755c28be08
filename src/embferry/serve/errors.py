"""Errors of the HTTP API: a stable code, an HTTP status, and the body that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from embferry.protocol.errors import EmbferryError
from embferry.protocol.text import printable

CODES: dict[str, tuple[int, str]] = {
    # The request itself
    "invalid_json": (400, "The body is not a JSON object."),
    "invalid_request": (400, "A field is missing, or its type or value is wrong."),
    "unsupported_value": (400, "The field is known, but this value of it is not supported."),
    "head_too_large": (431, "The head of the request, its first line and its headers, is longer than 64 KiB."),
    "body_too_large": (413, "The body is longer than `router.max_body_bytes`."),
    "body_timeout": (408, "The body stopped arriving for longer than `router.body_timeout`, or arrived too slowly."),
    "body_damaged": (400, "The body that arrived does not match its `Content-Digest`; send it again."),
    "unsupported_encoding": (415, "The body has another `Content-Encoding` than gzip."),
    "invalid_encoding": (400, "The body is not gzip, as its `Content-Encoding` says."),
    "invalid_api_key": (401, "The `Authorization` header is missing or wrong."),
    "rate_limited": (
        429,
        "More requests at once, or more requests or bytes a second, than one client may have.",
    ),
    "model_not_found": (404, "The model is not served here; `/v1/models` lists those that are."),
    "not_found": (404, "Nothing is served at this path."),
    "method_not_allowed": (405, "The path does not accept this method."),
    # The source of a picture, video or sound
    "too_many_images": (400, "More pictures than `media.max_images`."),
    "too_many_videos": (400, "More videos than `media.max_videos`."),
    "too_many_sounds": (400, "Before vLLM: more sounds than `media.max_images`."),
    "too_many_frames": (400, "More frames in a list than `media.max_video_frames`."),
    "invalid_url": (400, "The URL is malformed, or its data is not base64."),
    "unsupported_url_scheme": (400, "The URL is none of `data:`, `http:`, `https:` and `file:`."),
    "host_not_allowed": (403, "The host is not in `media.allowed_hosts`, or resolves to a private address."),
    "file_not_allowed": (403, "The file is in none of the `media.allowed_folders`."),
    "file_not_found": (400, "The allowed folder has no such file."),
    "fetch_failed": (400, "The host did not deliver the file."),
    "fetch_timeout": (400, "The host took longer than `media.fetch_timeout`."),
    "media_too_large": (413, "More bytes than `media.max_bytes`, or than `media.max_total_bytes` for all together."),
    "unknown_media_uuid": (
        400,
        "The `uuid` stands for no file of this client that the router still keeps; send the file itself.",
    ),
    # Its content
    "media_empty": (400, "The file is empty."),
    "unsupported_media_type": (415, "The bytes have no supported format; the content type does not matter."),
    "wrong_media_kind": (400, "A picture, video or sound in place of another of these."),
    "image_truncated": (400, "The picture ends too early."),
    "image_corrupt": (400, "The picture cannot be decoded."),
    "media_zero_size": (400, "The picture or video is 0 pixels wide or high."),
    "media_side_too_long": (400, "One side is longer than `media.max_side`."),
    "media_aspect_ratio": (400, "One side is more than `media.max_aspect_ratio` times the other."),
    "media_too_many_pixels": (400, "More pixels than `media.max_pixels`, by the header, before decoding."),
    "video_truncated": (400, "The video ends too early."),
    "video_corrupt": (400, "The video cannot be decoded."),
    "audio_corrupt": (400, "Before vLLM: the sound cannot be decoded."),
    "video_too_long": (400, "The video lasts longer than `media.max_video_seconds`."),
    "video_frame_sizes": (400, "The frames of a video differ in size."),
    "media_decoder_failed": (
        400,
        "The decoder broke down, or needed more memory or time than `media.decode_memory`, "
        "`media.image_decode_timeout` and `media.video_decode_timeout` allow. Before vLLM: two instances ended during "
        "the encode.",
    ),
    # The workers
    "no_worker": (503, "No worker of the needed kind is registered, or none can be reached."),
    "worker_unfit": (503, "The encode worker encodes nothing, not even a test picture of its own."),
    "worker_failed": (502, "A worker broke off, or its answer is malformed."),
    "worker_ending": (
        503,
        "The language worker was told to end, or a bug has stopped it, before the end of the answer.",
    ),
    "network_damage": (502, "What a router and a worker send each other arrived changed, also when sent again."),
    "request_timeout": (504, "The request took longer than `router.request_timeout`."),
    "internal_error": (500, "A bug of the server; the log has the details under the request's id."),
}
"""Every code of this layer, its status and its meaning. The codes of workers are passed on beside these."""

RETRYABLE = frozenset(
    {
        "rate_limited",
        "no_worker",
        "worker_unfit",
        "worker_failed",
        "worker_ending",
        "body_damaged",
        "network_damage",
    }
)
"""The codes with which the same request may succeed later."""
_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
}  # fmt: skip


class ServeError(EmbferryError):
    """A request fails.

    Args:
        code: One of CODES, or a worker's, which needs ``status``.
        detail: What happened and what to do.
        param: The wrong field of the request, as OpenAI names it.
        status: The HTTP status; None: that of the code.
        retryable: Whether the same request may succeed later, for an error that is passed on; None: the code decides.
        retry_after: After how many seconds it may.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        status: int | None = None,
        retryable: bool | None = None,
        retry_after: int = 1,
    ) -> None:
        http_status = CODES[code][0] if status is None else status
        super().__init__(detail, retryable=is_retryable(code, http_status) if retryable is None else retryable)
        self.code, self.http_status, self.retry_after = printable(code, 100), http_status, retry_after
        self.param = None if param is None else printable(param, 200)

    def at(self, param: str) -> ServeError:
        """Sets ``param`` unless it is set, and returns the error."""
        self.param = self.param or param
        return self

    @property
    def kind(self) -> str:
        """OpenAI's ``type`` of the error."""
        return _TYPES.get(self.http_status, "invalid_request_error" if self.http_status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error envelope."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}


def is_retryable(code: str, status: int) -> bool:
    """Returns whether the same request may succeed later. Where the code is not ours, the status decides."""
    return code in RETRYABLE if code in CODES else status in (429, 503, 504)


def from_body(body: Any, status: int) -> ServeError:
    """Returns the error in a worker's response, or ``worker_failed`` if the body is no error envelope.

    Args:
        body: the decoded JSON.
        status: the response's status, for a body that names none.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ServeError("worker_failed", f"a worker answered with status {status} without a reason")
    code, param, retryable = error.get("code"), error.get("param"), error.get("retryable")
    claimed = error.get("status", status)
    return ServeError(
        code if isinstance(code, str) else "worker_failed",
        error["message"],
        param=param if isinstance(param, str) else None,
        status=claimed if isinstance(claimed, int) and 400 <= claimed <= 599 else 502,
        retryable=retryable if isinstance(retryable, bool) else None,
    )
