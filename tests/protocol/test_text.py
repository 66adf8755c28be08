"""Foreign text: cut, escaped, on one line."""

from __future__ import annotations

import pytest

from embferry.protocol.errors import EmbferryError
from embferry.protocol.text import printable, shown
from embferry.serve.errors import ServeError, from_body

CONTROL = "a\nb\rc\x00d\x1b[1me\u2028f\u202eg\x85h\ud800"
LONG = "n" * 20_000_000


def test_control_characters_become_escapes() -> None:
    assert printable(CONTROL) == "a\\nb\\rc\\x00d\\x1b[1me\\u2028f\\u202eg\\x85h\\ud800"
    assert printable("Größe: 2 × 3 … 漢字") == "Größe: 2 × 3 … 漢字"


@pytest.mark.parametrize(
    "value",
    [LONG, LONG.encode(), [LONG] * 1000, {LONG: [LONG]}, ((((((((LONG,),),),),),),),), {LONG}, [[]] * 10**6, 10**4000],
)
def test_a_large_value_is_shown_by_its_beginning(value: object) -> None:
    assert len(shown(value, 80)) <= 81


def test_errors_are_printable_and_short() -> None:
    for error in (EmbferryError(CONTROL + LONG), ServeError("invalid_request", CONTROL + LONG, param=CONTROL + LONG)):
        assert len(error.detail) < 2100
        assert error.detail.isprintable()
    error = from_body({"error": {"message": CONTROL + LONG, "code": CONTROL + LONG, "param": LONG}}, 400)
    assert len(str(error.body())) < 3000
    assert all(value is None or value.isprintable() for value in error.body()["error"].values())
