"""Loading the two halves: each opens its own tensors only, and damaged files are rejected."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from embferry.engine import checkpoint as checkpoint_module
from embferry.engine.checkpoint import Checkpoint, read_config
from embferry.engine.encoder import Encoder
from embferry.engine.errors import CheckpointError, UnsupportedModel
from embferry.engine.families import SUPPORTED, family_of
from embferry.engine.language import LanguageModel
from embferry.engine.media import MediaProcessor
from embferry.engine.prompt import PromptBuilder
from embferry.engine.sampling import SamplingParams
from tests.engine.cases import CASES, Split, assert_same


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Records the names of the tensors that are read from safetensors files."""
    names: list[str] = []

    class Recording:
        def __init__(self, *args, **kwargs):
            self._file = real(*args, **kwargs)

        def __enter__(self):
            self._open = self._file.__enter__()
            return self

        def __exit__(self, *args):
            return self._file.__exit__(*args)

        def keys(self):
            return self._open.keys()

        def get_tensor(self, name):
            names.append(name)
            return self._open.get_tensor(name)

    real = checkpoint_module.safe_open
    monkeypatch.setattr(checkpoint_module, "safe_open", Recording)
    return names


def tensors_of(path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_each_half_opens_its_own_tensors_only(model_dir, family_name, opened):
    path = model_dir(family_name)
    everything = tensors_of(path)
    Encoder.load(path, torch.float32)
    seen_by_encoder = sorted(opened)
    opened.clear()
    LanguageModel.load(path, torch.float32)
    seen_by_language = sorted(opened)
    assert seen_by_encoder == sorted(name for name in everything if "visual." in name)
    assert seen_by_language == sorted(name for name in everything if "visual." not in name)
    assert len(list(path.glob("*.safetensors"))) > 2


def test_no_tensor_stays_on_the_meta_device(split, family_name):
    models = split(family_name)
    for module in (models.encoder._tower, models.language._decoder):
        tensors = [*module.parameters(), *module.buffers()]
        assert tensors
        assert not any(tensor.is_meta for tensor in tensors)


OLD_NAMES = {"model.visual.": "visual.", "model.language_model.": "model."}
NEW_NAMES = {"visual.": "model.visual.", "model.": "model.language_model."}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors under the other of the two forms of names that checkpoints have."""
    names = OLD_NAMES if any(name.startswith("model.visual.") for name in tensors) else NEW_NAMES
    found = {name: next((prefix for prefix in names if name.startswith(prefix)), "") for name in tensors}
    return {names.get(prefix, "") + name[len(prefix) :]: tensors[name] for name, prefix in found.items()}


def test_a_single_file_with_the_other_form_of_names_loads_the_same(model_dir, family_name, split, tmp_path):
    path = model_dir(family_name)
    for file in path.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, tmp_path)
    shutil.copy(path / "chat_template.jinja", tmp_path)
    tensors = tensors_of(path)
    other = renamed(tensors)
    assert len(other) == len(tensors)
    assert set(other) & set(tensors) <= {"lm_head.weight"}
    save_file(other, tmp_path / "model.safetensors")
    new = split(family_name)
    old = Split(
        tmp_path, Encoder.load(tmp_path, torch.bfloat16), LanguageModel.load(tmp_path, torch.bfloat16), new.undivided
    )
    asked, params = old.ask(CASES["image and video"]()), SamplingParams(max_tokens=4, ignore_eos=True)
    same = split(family_name, torch.bfloat16)
    theirs = same.ask(CASES["image and video"]())
    assert_same(old.answer(asked.prompt, asked.source(), params), same.answer(theirs.prompt, theirs.source(), params))


def test_the_error_for_an_unknown_family_lists_the_supported_ones(model_dir):
    config = AutoConfig.from_pretrained(model_dir("qwen2_vl"))
    config.model_type = "llava"
    with pytest.raises(UnsupportedModel, match=f"llava is not supported; {', '.join(SUPPORTED)}"):
        family_of(config)


@pytest.mark.parametrize("damage", ["no config", "no weights", "missing tensor", "wrong shape", "not safetensors"])
def test_a_damaged_checkpoint_is_rejected(model_dir, tmp_path, damage):
    path = tmp_path / "model"
    shutil.copytree(model_dir("qwen2_vl"), path)
    index = path / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    name = next(name for name in shards if name.endswith("merger.mlp.0.weight"))
    shard = path / shards[name]
    if damage == "no config":
        (path / "config.json").unlink()
    elif damage == "no weights":
        index.unlink()
    elif damage == "not safetensors":
        shard.write_bytes(b"not a file of tensors")
    else:
        tensors = load_file(shard)
        tensors[name] = tensors[name][:, :-1].contiguous()
        save_file(tensors, shard)
        if damage == "missing tensor":
            del shards[name]
            index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError):
        Encoder.load(path, torch.float32)


def test_prompts_and_media_need_no_weights(model_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(model_dir("qwen3_vl"), path, ignore=shutil.ignore_patterns("*.safetensors*"))
    assert PromptBuilder.load(path).build([{"role": "user", "content": "hello"}]).num_visual == 0
    assert MediaProcessor.load(path).tokens_of((64, 64)) == 16


@pytest.mark.parametrize("text", ["not json", '{"model_type": "no such model"}'])
def test_an_unreadable_configuration_is_rejected(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="configuration"):
        read_config(tmp_path)


def test_a_missing_head_is_rejected_unless_it_is_tied(model_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(model_dir("qwen2_vl"), path)
    index = path / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    del shards["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match="lm_head"):
        LanguageModel.load(path, torch.float32)


def test_unknown_tensors_belong_to_neither_half(model_dir):
    family = family_of(Checkpoint(model_dir("qwen3_vl")).config)
    assert family.place("optimizer.state") is None
