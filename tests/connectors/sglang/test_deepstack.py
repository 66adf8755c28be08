"""A model with deepstack (Qwen3-VL), whose tokens are several times as wide: the model in this package."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.models import model_path
from tests.ports import free_port

from .servers import ANSWER_S, DIVIDED, PLUGIN, Server
from .stage import started

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

MEDIA = Path(__file__).parents[3] / "examples" / "media"
QUESTIONS = {"garden.png": "what colour is the square?"}


def answer(server: Server, name: str) -> str:
    url = "data:image/png;base64," + base64.b64encode((MEDIA / name).read_bytes()).decode()
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTIONS[name]},
    ]
    body = {"model": "shapes", "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": content}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=ANSWER_S, trust_env=False)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"]).strip()


def test_a_picture_is_understood(tmp_path: Path) -> None:
    model = model_path("shapes")
    with Server(model, tmp_path / "encoder.log", ["--encoder-only", *DIVIDED], PLUGIN) as encoder:
        bootstrap = ["--encoder-bootstrap-port", str(free_port())]
        arguments = ["--language-only", "--encoder-urls", encoder.url, *bootstrap, *DIVIDED]
        with Server(model, tmp_path / "language.log", arguments, PLUGIN) as language:
            started([encoder, language])
            assert answer(language, "garden.png") == "blue"
            assert "completed with resumed transfer" in language.text()
