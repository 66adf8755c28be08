"""Real clusters, one per transport, and the answers of one undivided process."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embferry.serve.config import BootstrapSettings, RouterSettings, Settings, TransferSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.supervisor import LocalCluster
from embferry.serve.undivided import Undivided, UndividedAnswer
from tests.serve.pictures import encoded, noise

MEDIA = Path(__file__).parents[2] / "examples" / "media"
BLOCKS, BLOCK_SIZE = 8, 8
MAX_TOKENS = 16
REQUEST_TIMEOUT = 1000.0
"""Seconds until a request counts as hanging."""
START_TIMEOUT = 300.0
"""Seconds until the start of a cluster counts as hanging."""


@dataclass(frozen=True, slots=True)
class Question:
    """Media and a question. ``truth`` is the correct answer, or None if only the undivided model can tell."""

    media: tuple[EncodeItem, ...]
    text: str
    truth: str | None = None

    @property
    def messages(self) -> list[Any]:
        parts: list[Any] = []
        for item in self.media:
            url = f"data:application/octet-stream;base64,{base64.b64encode(item.data or b'').decode()}"
            parts.append({"type": f"{item.kind}_url", f"{item.kind}_url": {"url": url}})
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def questions() -> list[Question]:
    """Returns the questions in ``examples/``, and questions about pictures of noise of many sizes."""
    found = []
    for entry in json.loads((MEDIA / "questions.json").read_text()):
        items = [
            EncodeItem("video" if name.endswith(".mp4") else "image", (MEDIA / name).read_bytes())
            for name in entry["media"]
        ]
        found.append(Question(tuple(items), entry["question"], entry["answer"]))
    rng = random.Random(0)
    for _ in range(24):
        size = rng.randrange(40, 300), rng.randrange(40, 300)
        found.append(Question((EncodeItem("image", encoded(noise(*size))),), "what is there?"))
    return found


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(
        router=RouterSettings(port=0, request_timeout=REQUEST_TIMEOUT),
        bootstrap=BootstrapSettings(port=0),
        transfer=TransferSettings(num_blocks=BLOCKS, block_size=BLOCK_SIZE),
    )


@pytest.fixture(scope="session")
def expected(settings: Settings) -> list[tuple[Question, UndividedAnswer]]:
    """The answers of one process, computed before the clusters start."""
    undivided = Undivided(settings)
    return [(question, undivided.answer(question.media, question.text, MAX_TOKENS)) for question in questions()]


@pytest.fixture(scope="session", params=["shm", pytest.param("tcp", marks=pytest.mark.sweeps)])
def cluster(
    request: pytest.FixtureRequest,
    settings: Settings,
    expected: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalCluster]:
    transfer = TransferSettings(transports=(request.param,), num_blocks=BLOCKS, block_size=BLOCK_SIZE)
    logs = tmp_path_factory.mktemp("cluster") / "log"
    with LocalCluster(settings.model_copy(update={"transfer": transfer}), logs=logs) as running:
        running.wait_ready(START_TIMEOUT)
        yield running
