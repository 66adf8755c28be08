"""Errors of the HTTP API: a stable code, the status it becomes, and the body OpenAI clients understand."""

from __future__ import annotations

from typing import Any

CODES: dict[str, tuple[int, str]] = {
    # The request itself
    "invalid_json": (400, "The body is not a JSON object."),
    "invalid_request": (400, "A field is missing, has the wrong type or a value that cannot be."),
    "unsupported_value": (400, "The field is known, this value of it is not offered."),
    "body_too_large": (413, "The body is longer than `router.max_body_bytes`."),
    "invalid_api_key": (401, "The `Authorization` header is missing or wrong."),
    "model_not_found": (404, "The model is not served here; `/v1/models` lists what is."),
    "not_found": (404, "There is nothing at this path."),
    "method_not_allowed": (405, "The path does not take this method."),
    # Where a picture or video comes from
    "too_many_images": (400, "More pictures than `media.max_images`."),
    "too_many_videos": (400, "More videos than `media.max_videos`."),
    "too_many_frames": (400, "More frames in a list than `media.max_video_frames`."),
    "invalid_url": (400, "The URL cannot be understood, or its data is not base64."),
    "unsupported_url_scheme": (400, "Only `data:`, `http:`, `https:` and `file:` URLs are read."),
    "host_not_allowed": (403, "The host is not in `media.allowed_hosts`, or leads to a private address."),
    "file_not_allowed": (403, "The file is in none of `media.allowed_folders`."),
    "file_not_found": (400, "The allowed folder holds no such file."),
    "fetch_failed": (400, "The host did not hand out the file."),
    "fetch_timeout": (400, "The host took longer than `media.fetch_timeout`."),
    "media_too_large": (413, "More bytes than `media.max_bytes`, or than `media.max_total_bytes` for all together."),
    # What is in it
    "media_empty": (400, "There are no bytes."),
    "unsupported_media_type": (415, "The bytes are of no format that is read, whatever the content type says."),
    "wrong_media_kind": (400, "A video where a picture belongs, or the other way round."),
    "image_animated": (400, "The picture has several frames; send it as a video or send one of them."),
    "image_truncated": (400, "The picture ends too early."),
    "image_corrupt": (400, "The picture cannot be decoded."),
    "media_zero_size": (400, "The picture or video is 0 pixels wide or high."),
    "media_side_too_long": (400, "One side is longer than `media.max_side`."),
    "media_aspect_ratio": (400, "One side is more than `media.max_aspect_ratio` times the other."),
    "media_too_many_pixels": (400, "More pixels than `media.max_pixels`, found in the header before decoding."),
    "video_truncated": (400, "The video ends too early."),
    "video_corrupt": (400, "The video cannot be decoded."),
    "video_too_long": (400, "The video lasts longer than `media.max_video_seconds`."),
    "video_frame_sizes": (400, "The frames of a video differ in size."),
    # The workers
    "no_worker": (503, "No worker of the kind that is needed is there, or none can be reached."),
    "worker_failed": (502, "A worker broke off, or said something that cannot be understood."),
    "request_timeout": (504, "The request took longer than `router.request_timeout`."),
    "internal_error": (500, "A fault of ours; the log has the details under the request's id."),
}
"""Every code this layer gives, its status and what it means. Workers' own codes are passed on beside these."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class ServeError(Exception):
    """A request that cannot be answered.

    Args:
        code: one of CODES, or a worker's; then ``status`` must be given.
        message: what happened and what to do about it.
        param: the field of the request that is at fault, as OpenAI names it.
        retryable: whether the same request may succeed later.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.status = CODES[code][0] if status is None else status
        self.retryable = self.status in (429, 503, 504) if retryable is None else retryable

    def at(self, param: str) -> ServeError:
        """The same error, blaming the field ``param`` unless it blames one already."""
        self.param = self.param or param
        return self

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def from_body(body: Any, status: int) -> ServeError:
    """The error a worker answered with; ``worker_failed`` if what it said is no error envelope."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ServeError("worker_failed", f"a worker answered with status {status} and no reason")
    code, param, retryable = error.get("code"), error.get("param"), error.get("retryable")
    claimed = error.get("status", status)
    return ServeError(
        code if isinstance(code, str) else "worker_failed",
        error["message"],
        param=param if isinstance(param, str) else None,
        status=claimed if isinstance(claimed, int) and 400 <= claimed <= 599 else 502,
        retryable=retryable if isinstance(retryable, bool) else None,
    )
