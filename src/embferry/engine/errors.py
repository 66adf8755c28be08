"""Errors of the engine: for each kind a stable code, an HTTP status, and whether the same request may succeed later."""

from __future__ import annotations

from embferry.protocol.errors import EmbferryError


class EngineError(EmbferryError):
    """Base of the errors that the engine raises."""

    code = "engine_error"


class UnsupportedModel(EngineError):
    """The checkpoint is of a family without an adapter."""

    code = "unsupported_model"


class CheckpointError(EngineError):
    """The files of the model are incomplete or contradict each other."""

    code = "checkpoint_invalid"


class RequestError(EngineError):
    """The request is wrong; no other request is affected.

    Args:
        detail: One sentence: what is wrong.
        param: The name of the wrong field, where it is one; ``constraint`` stands for the form of the answer.
    """

    code = "invalid_request"
    http_status = 400

    def __init__(self, detail: str, *, param: str | None = None) -> None:
        super().__init__(detail)
        self.param = param


class MediaError(RequestError):
    """A picture or video cannot be prepared."""

    code = "invalid_media"


class PromptError(RequestError):
    """No prompt can be built from the messages."""

    code = "invalid_prompt"


class PromptTooLong(PromptError):
    """The prompt has more tokens than the model has positions."""

    code = "context_length_exceeded"


class ParameterError(RequestError):
    """A sampling parameter is out of range."""

    code = "invalid_parameter"


class EmbeddingMismatch(EngineError):
    """The embedding that arrived does not belong to the prompt."""

    code = "embedding_mismatch"
    http_status = 502


class QueueFull(EngineError):
    """The scheduler holds as many requests as it may; the request may succeed later."""

    code = "queue_full"
    http_status = 503
    default_retryable = True
