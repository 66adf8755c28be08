"""The page on errors says what the routers send."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embferry.serve.errors import CODES, ServeError
from embferry.serve.http.errors import error_response

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
ROWS = re.findall(
    r"\| `(\w+)` \| (\d+) \| (yes|no) \|", PAGE.partition("## Errors of the HTTP API")[2].partition("\n## ")[0]
)


def test_the_page_lists_every_code() -> None:
    assert {code for code, _, _ in ROWS} == CODES.keys()


@pytest.mark.parametrize(("code", "status", "retry"), ROWS)
def test_a_response_has_the_status_and_the_advice_of_the_page(code: str, status: str, retry: str) -> None:
    response = error_response(ServeError(code, "why"))
    advice = {"yes": "true", "no": "false"}[retry]
    assert response.status_code == int(status)
    assert response.headers.get("x-should-retry", "false") == advice


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (404, "not_found_error"), (413, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error"),
    ],
)  # fmt: skip
def test_the_type_is_the_one_of_openai_and_on_the_page(status: int, kind: str) -> None:
    assert ServeError("invalid_request", "why", status=status).body()["error"]["type"] == kind
    assert f"`{kind}`" in PAGE
