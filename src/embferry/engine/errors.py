"""Errors of the engine.

    EngineError
    ├── UnsupportedModel        the checkpoint is of a family without an adapter
    ├── CheckpointError         the files of the model are incomplete or contradict each other
    ├── RequestError            the request is at fault; nothing else is affected
    │   ├── MediaError          a picture or a video that cannot be prepared
    │   ├── PromptError         messages the prompt cannot be made of
    │   │   └── PromptTooLong   more tokens than the model has positions for
    │   └── ParameterError      sampling parameters out of range
    ├── EmbeddingMismatch       what arrived is not the embedding the prompt is about
    └── QueueFull               more requests than the scheduler may hold

Each class carries a stable ``code``, the HTTP status it becomes, and whether the same request may succeed later.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""

    code: ClassVar[str] = "engine_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False


class UnsupportedModel(EngineError):
    """The checkpoint is of a family without an adapter."""

    code = "unsupported_model"


class CheckpointError(EngineError):
    """The files of the model are incomplete or contradict each other."""

    code = "checkpoint_invalid"


class RequestError(EngineError):
    """The request is at fault; nothing else is affected."""

    code = "invalid_request"
    http_status = 400


class MediaError(RequestError):
    """A picture or a video that cannot be prepared."""

    code = "invalid_media"


class PromptError(RequestError):
    """Messages that no prompt can be made of."""

    code = "invalid_prompt"


class PromptTooLong(PromptError):
    """More tokens than the model has positions for."""

    code = "context_length_exceeded"


class ParameterError(RequestError):
    """A sampling parameter is out of range."""

    code = "invalid_parameter"


class EmbeddingMismatch(EngineError):
    """What arrived is not the embedding the prompt is about."""

    code = "embedding_mismatch"
    http_status = 502


class QueueFull(EngineError):
    """More requests than the scheduler may hold. Ask again later."""

    code = "queue_full"
    http_status = 503
    retryable = True
