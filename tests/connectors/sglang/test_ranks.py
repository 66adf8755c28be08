"""A language server of two tensor-parallel ranks: one receives, the other maps what it has received."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ports import free_port

from .servers import DIVIDED, PLUGIN, Server, ask, tokens_of
from .stage import QUESTIONS, answers_of_one, damaged, started

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]


def test_two_ranks_answer_as_one_server(tmp_path: Path) -> None:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    model = tmp_path / "model"
    make(model)
    expected, _ = answers_of_one(model, tmp_path / "undivided.log")
    with Server(model, tmp_path / "encoder.log", ["--encoder-only", *DIVIDED], PLUGIN) as encoder:
        bootstrap = ["--encoder-bootstrap-port", str(free_port())]
        arguments = ["--language-only", "--tp", "2", "--encoder-urls", encoder.url, *bootstrap, *DIVIDED]
        bound = PLUGIN | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
        with Server(model, tmp_path / "language.log", arguments, bound) as language:
            started([encoder, language])
            for name, pictures in QUESTIONS.items():
                assert tokens_of(ask(language, pictures)) == expected[name], name
            assert ask(language, [damaged(1)]).status_code == 400
            assert tokens_of(ask(language, QUESTIONS["two"])) == expected["two"]
            log = language.text()
            assert log.count("completed with resumed transfer: 400 tokens") == 1  # once for both ranks
