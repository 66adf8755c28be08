"""Writes docs/errors.md from the errors' classes. With ``--check``, only exits with status 1 if it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from embferry.engine.errors import EngineError
from embferry.plan.errors import PlanError
from embferry.protocol.errors import BY_CODE, EmbeddingTransferError, EmbferryError
from embferry.serve.errors import CODES, is_retryable
from generated_page import write_or_check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"

HEAD = """# Errors

Generated from the code by `python scripts/document_errors.py`; edits here are lost.

Every error has a stable code, which appears in logs, in wire messages and in HTTP bodies. The HTTP API returns it in
OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`. The message says what happened and what to do. The
column "retry" says whether the same request may succeed later; the header `x-should-retry` says it for one response.
The type follows from the status, as OpenAI's does: `authentication_error` (401), `permission_error` (403),
`not_found_error` (404), `rate_limit_error` (429), `invalid_request_error` (any other below 500), `server_error`.
"""

TABLE = "| code | HTTP | retry | meaning |\n|---|---|---|---|"


def page() -> str:
    """Returns the page."""
    transfer = [
        (cls.code, cls.http_status, cls.default_retryable, _first_line(cls))
        for cls in BY_CODE.values()
        if cls is not EmbeddingTransferError
    ]
    engine = [(cls.code, cls.http_status, cls.default_retryable, _first_line(cls)) for cls in _tree(EngineError)]
    api = [(code, status, is_retryable(code, status), meaning) for code, (status, meaning) in CODES.items()]
    parts = [HEAD]
    parts += [
        "## Errors of a transfer\n\nSubclasses of `EmbeddingTransferError`; they carry the `room` too.\n",
        _table(transfer),
    ]
    parts += ["## Errors of the engine\n\nSubclasses of `EngineError`.\n", _table(engine)]
    parts += ["## Errors of the HTTP API\n", _table(api)]
    plan = [(cls.code, cls.http_status, cls.default_retryable, _first_line(cls)) for cls in _tree(PlanError)]
    parts += [
        "## Errors of `embferry plan`\n\nOn standard error, with the exit status 2, or 1 where a server is measured or "
        "the devices do not carry\nthe rate.\n"
    ]
    parts += [_table(plan)]
    return "\n".join(parts)


def _tree(cls: type[EmbferryError]) -> list[type[EmbferryError]]:
    return [found for child in cls.__subclasses__() for found in (child, *_tree(child))]


def _first_line(cls: type[Exception]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _table(rows: list[tuple[str, int, bool, str]]) -> str:
    lines = [
        f"| `{code}` | {status} | {'yes' if again else 'no'} | {meaning} |" for code, status, again, meaning in rows
    ]
    return "\n".join([TABLE, *lines, ""])


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
