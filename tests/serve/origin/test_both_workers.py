"""Both workers of ours on the origin's wire, behind what SGLang's load balancer does."""

from __future__ import annotations

import base64

import pytest

from tests.serve.origin.joined import run
from tests.serve.pictures import png

pytestmark = pytest.mark.integration


def picture(data: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def chat(question: str, *pictures: bytes) -> list[dict[str, object]]:
    return [{"role": "user", "content": [*map(picture, pictures), {"type": "text", "text": question}]}]


RED, BLUE = png(64, 64, "red"), png(64, 64, "blue")
WIDE = png(640, 480, "green")


@pytest.mark.parametrize(
    "pictures", [(), (RED,), (RED, BLUE), (WIDE,)], ids=["text only", "one", "two", "longer than the pool"]
)
def test_the_answer_is_that_of_the_undivided_model(workers, models, pictures):
    asked = chat("what colour is it?", *pictures)
    answer = run(workers.ask(asked))
    assert answer.text == models.answer(asked, *pictures)
    usage = answer.answered.json()["usage"]
    prompt, _ = models.prompt(asked, *pictures)
    assert usage["prompt_tokens"] == prompt.length == answer.encoded.json()["usage"]["prompt_tokens"]
