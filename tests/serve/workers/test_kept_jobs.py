"""Jobs of a language worker whose embeddings lie in a folder in memory while they arrive."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embferry.kept.folder import KeptFolder
from embferry.serve.language.pipeline import JobPipeline
from tests.kept.conftest import place
from tests.serve.pictures import encoded, noise
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import Joined, generate_body, run

__all__ = ["place"]

QUESTION = "what is there?"


def picture(seed: int = 0) -> dict[str, Any]:
    return {"kind": "image", "data": encoded(noise(96 + 32 * seed, 64))}


@pytest.fixture
def joined(join: MakeJoined, place: Path) -> Iterator[Joined]:
    """Yields workers with such a folder, which is empty after the test."""
    yield join(language={"kept_folder": place})
    assert not place.exists() or os.listdir(place) == []


def kept_of(joined: Joined) -> KeptFolder:
    kept = joined.language._pipeline.kept
    assert kept is not None
    return kept


def made_by(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Returns the files that are made from now on."""
    kept, made = kept_of(joined), list[object]()
    make: Callable[..., object] = kept.make

    def noted(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(kept, "make", noted)
    return made


def test_an_answer_is_the_same_and_leaves_nothing(joined: Joined, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_by(joined, monkeypatch)
    answer = run(joined.ask(QUESTION, picture(), picture(1)))
    assert answer.tokens == joined.reference(QUESTION, picture(), picture(1))
    assert "kept_tokens" not in answer.last["transfer"]
    assert made != []
    assert None not in made
    assert os.listdir(place) == []


def test_text_alone_needs_no_file(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_by(joined, monkeypatch)
    assert run(joined.ask(QUESTION)).status == 200
    assert made == []


def test_a_look_that_fails_costs_no_request(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(JobPipeline, "_take_kept", broken)
    answer = run(joined.ask(QUESTION, picture()))
    assert answer.tokens == joined.reference(QUESTION, picture())


def test_a_request_that_is_refused_before_its_transfer_gives_back_what_it_took(
    joined: Joined, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []

    def take(digest: bytes, tokens: int) -> Any:
        taken.append(kept_of(joined).make(digest, tokens))
        return taken[-1]

    monkeypatch.setattr(kept_of(joined), "take", take)
    monkeypatch.setattr(joined.language.manager, "open", _refusing)

    async def ask() -> int:
        encoded = (await joined.post_encode(picture())).json()
        response = await joined.post_generate(generate_body(encoded, QUESTION))
        joined.encode.abort_room(encoded["room"])
        return response.status_code

    assert run(ask()) >= 500
    assert len(taken) == 1
    assert os.listdir(place) == []


def _refusing(*_: object, **__: object) -> None:
    raise OSError("no descriptors")
