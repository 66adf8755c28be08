"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

import pytest

from embferry.serve.openai.ignored import HEADER
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.inside import Inside

pytestmark = pytest.mark.asyncio

PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}


def asked(inside: Inside) -> dict[str, Any]:
    """Returns the last request that the language worker got."""
    return dict(inside.fakes["language0"].requests[-1])


async def test_tokens_are_asked_for_at_a_language_worker(inside: Inside) -> None:
    response = await inside.post(
        "/tokenize", {"prompt": "hello", "return_token_strs": True, "add_special_tokens": True}
    )
    assert response.json() == {"count": 5, "tokens": [104, 101, 108, 108, 111]}
    assert asked(inside) | {"prompt": "hello", "strings": True} == asked(inside)
    response = await inside.post("/tokenize", {"messages": user("hi"), "add_generation_prompt": False})
    assert response.status_code == 200
    assert asked(inside)["opens"] is False
    response = await inside.post("/detokenize", {"tokens": [104, 105], "model": "shapes"})
    assert response.json() == {"prompt": "hi"}


async def test_fields_of_conversations_are_named_beside_a_text(inside: Inside) -> None:
    body = {"prompt": "hello", "add_generation_prompt": True, "continue_final_message": None}
    assert (await inside.post("/tokenize", body)).headers[HEADER] == "add_generation_prompt"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": user(PICTURE)}, "messages[0].content[0]"),
        ("/tokenize", {"messages": user("hi"), "prompt": "x"}, "prompt"),
        ("/tokenize", {"messages": user("hi"), "prompt": ""}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"tokens": [1], "model": 5}, "model"),
    ],
)
async def test_tokens_that_are_refused(inside: Inside, path: str, body: Any, param: str) -> None:
    response = await inside.post(path, body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
