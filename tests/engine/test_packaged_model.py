"""The packaged model: its two halves give the same results as the undivided model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from embferry.engine.language import DEFAULT_CHUNK_TOKENS
from embferry.engine.sampling import SamplingParams
from embferry.engine.scheduler import Request, Scheduler
from embferry.models import model_path
from tests.engine.cases import CASES, Split, assert_same
from tests.engine.test_scheduler import Arriving, drive, endless, tokens_of

ROOT = Path(__file__).parents[2]
TOKENS = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def models(request) -> Split:
    return Split.load(model_path("shapes"), request.param)


@pytest.mark.parametrize("case", CASES)
def test_the_halves_equal_the_undivided_model(models, case):
    asked = models.ask(CASES[case]())
    run = models.answer(asked.prompt, asked.source(), TOKENS)
    assert_same(run, models.undivided.run(asked.prompt, asked.prepared, TOKENS))
    stock = models.generate(asked, len(run.tokens))
    assert_same(run, stock)


@pytest.mark.parametrize("chunk", [64, DEFAULT_CHUNK_TOKENS])
def test_the_halves_equal_the_undivided_model_while_embeddings_arrive(models, chunk):
    models = models.chunked(chunk)
    scheduler, sources, asked = Scheduler(models.language), [], {}
    for seed, (name, case) in enumerate(CASES.items()):
        asked[name] = models.ask(case())
        sources.append(Arriving(asked[name].embeddings, endless(seed, 40)) if asked[name].embeddings else None)
        scheduler.add(Request(name, asked[name].prompt, TOKENS, sources[-1]))
    outputs = drive(scheduler, [source for source in sources if source is not None])
    for name, request in asked.items():
        assert tokens_of(outputs, name) == models.undivided.run(request.prompt, request.prepared, TOKENS).tokens


def test_the_example_of_the_documentation_prints_the_answer(monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(example, {})
    assert capsys.readouterr().out == "4"


def test_the_halves_have_all_parameters_of_the_whole(models):
    whole = sum(parameter.numel() for parameter in models.undivided.model.parameters())
    encoder, language = models.num_parameters()
    assert encoder + language == whole
    assert 0 < encoder < whole
