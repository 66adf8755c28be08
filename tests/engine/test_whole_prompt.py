"""A language model that is given the rows of the whole prompt equals the undivided model, bit by bit."""

from __future__ import annotations

import pytest
import torch

from embferry.engine.errors import CheckpointError
from embferry.engine.sampling import SamplingParams
from embferry.engine.scheduler import ResidentSource
from embferry.engine.whole_prompt import WholePrompt, prompt_of_rows, text_table, visual_id
from tests.engine.cases import CASES, assert_same

TOKENS = SamplingParams(max_tokens=12, ignore_eos=True)


class RowSource(ResidentSource):
    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        self._fields, self.digest, self.total_tokens = rows, b"", len(rows["fill_ids"])


def whole(models, asked, dtype):
    made = WholePrompt(asked.prompt, text_table(models.path, dtype), models.encoder.fields)
    for embedding in asked.embeddings:
        made.add(embedding)
    return made


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [7, 1 << 20], ids=["chunks", "one piece"])
def test_the_rows_of_a_whole_prompt_give_the_answer_of_the_undivided_model(split, family_name, chunk, case):
    models = split(family_name, torch.bfloat16).chunked(chunk)
    asked = models.ask(CASES[case]())
    rows = whole(models, asked, torch.bfloat16).rows
    prompt = prompt_of_rows(rows, asked.prompt.position_delta, is_text=case == "text")
    assert torch.equal(prompt.position_ids, asked.prompt.position_ids)
    assert prompt.position_delta == asked.prompt.position_delta
    answer = models.answer(prompt, RowSource(rows), TOKENS)
    assert_same(answer, models.undivided.run(asked.prompt, asked.prepared, TOKENS))


def test_rows_without_positions_are_counted(split):
    models = split("qwen3_vl")
    asked = models.ask([])
    rows = whole(models, asked, torch.float32).rows
    rows["mrope_positions"] = torch.full_like(rows["mrope_positions"], 77)
    prompt = prompt_of_rows(rows, 5, is_text=True)
    assert torch.equal(prompt.position_ids, asked.prompt.position_ids)
    assert prompt.position_delta == 0


def test_ids_of_visual_tokens_are_beyond_the_vocabulary_and_depend_on_the_content(split):
    models = split("qwen2_5_vl")
    asked = models.ask(CASES["three images"]())
    made = whole(models, asked, torch.float32)
    ids, vocabulary = made.rows["fill_ids"].reshape(-1), len(text_table(models.path, torch.float32))
    visual = asked.prompt.visual_positions
    assert torch.equal(ids[visual] >= vocabulary, torch.ones(len(visual), dtype=torch.bool))
    assert len(set(ids[visual].tolist())) == 3
    text = asked.prompt.mm_token_type_ids[0] == 0
    assert torch.equal(ids[text], asked.prompt.input_ids[0, text].to(torch.int32))
    assert vocabulary <= visual_id(b"\xff" * 16, vocabulary) < 1 << 30


def test_the_table_alone_is_read(split, monkeypatch):
    models = split("qwen2_vl")
    read: list[str] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: read.append("tensor") or tensor)
    text_table(models.path, torch.float32)
    assert read == ["tensor"]


def test_a_checkpoint_without_a_table_is_refused(split, monkeypatch):
    models = split("qwen2_vl")
    monkeypatch.setattr("embferry.engine.whole_prompt.TABLE", "elsewhere.weight")
    with pytest.raises(CheckpointError, match=r"lacks model.*elsewhere.weight"):
        text_table(models.path, torch.float32)
