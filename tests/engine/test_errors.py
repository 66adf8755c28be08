"""The engine's errors and those of a transfer have one base."""

from __future__ import annotations

from embferry.engine.errors import PromptTooLong, QueueFull
from embferry.protocol.errors import EmbferryError, TransportError


def test_errors_have_a_code_a_status_and_say_whether_to_retry() -> None:
    errors = [PromptTooLong("x"), QueueFull("x"), QueueFull("x", retryable=False), TransportError("x")]
    assert all(isinstance(error, EmbferryError) for error in errors)
    assert [(error.code, error.http_status, error.detail, error.retryable) for error in errors] == [
        ("context_length_exceeded", 400, "x", False),
        ("queue_full", 503, "x", True),
        ("queue_full", 503, "x", False),
        ("transport_error", 502, "x", True),
    ]
    assert str(errors[0]) == "x"
