"""Loading the two halves: each opens its own tensors only, and damaged files are rejected."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

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
from embferry.models.checkpoints import WEIGHTS as SINGLE
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


@pytest.fixture
def tensors(model_dir, family_name, tmp_path) -> tuple[dict[str, torch.Tensor], Path]:
    """Returns all tensors of a model, and a copy of its directory without them."""
    path = tmp_path / "model"
    shutil.copytree(model_dir(family_name), path, ignore=shutil.ignore_patterns("*.safetensors*"))
    return tensors_of(model_dir(family_name)), path


@pytest.fixture
def load(family_name, split, monkeypatch):
    """Loads the half of a tensor. The tokenizer, which takes longer and is not the subject, is of the whole model."""
    prompts = split(family_name).language.prompts
    monkeypatch.setattr(PromptBuilder, "load", lambda *_: prompts)
    return lambda path, name: (Encoder if "visual." in name else LanguageModel).load(path, torch.float32)


def resized(tensor: torch.Tensor):
    """Yields the tensor cut and grown by one in each of its dimensions, and with one dimension more."""
    for dim, side in enumerate(tensor.shape):
        if side > 1:
            yield tensor.narrow(dim, 0, side - 1)
        yield torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    yield tensor[None]


def replaced(tensors: dict[str, torch.Tensor], name: str, tensor: torch.Tensor | None, path) -> None:
    """Writes the tensors of the half that one of them belongs to, with that one replaced, or left out if None."""
    changed = {**tensors, name: tensor}
    save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, path / SINGLE)


def test_a_tensor_of_another_shape_is_rejected_by_its_name(tensors, load):
    held, path = tensors
    first_of_kind = {re.sub(r"\.\d+\.", ".", name): name for name in reversed(held)}  # layers have the same names
    for name, tensor in held.items():
        others = list(resized(tensor))
        for other in others if name in first_of_kind.values() else others[:1]:
            replaced(held, name, other, path)
            with pytest.raises(CheckpointError, match=f" {re.escape(name)} is {'×'.join(map(str, other.shape))}, and "):
                load(path, name)


def test_a_tensor_that_is_missing_is_named(tensors, load):
    held, path = tensors
    for name in held:
        replaced(held, name, None, path)
        with pytest.raises(CheckpointError, match=f": it lacks {re.escape(name)}; download it again"):
            load(path, name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_weights_of_other_numbers_are_rejected(tensors, load, dtype):
    held, path = tensors
    for name in ("lm_head.weight", *(key for key in held if key.endswith(("embed_tokens.weight", "qkv.weight")))):
        if name in held:
            replaced(held, name, held[name].to(dtype), path)
            with pytest.raises(CheckpointError, match=f"{re.escape(name)} has numbers of the type"):
                load(path, name)


def test_weights_that_are_no_finite_numbers_are_rejected(tensors, load):
    held, path = tensors
    for (name, tensor), value in zip(held.items(), itertools.cycle(map(float, ("nan", "inf", "-inf")))):
        spoiled = tensor.clone()
        spoiled.view(-1)[-1] = value
        replaced(held, name, spoiled, path)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} has values that are infinite or no numbers"):
            load(path, name)


@pytest.mark.parametrize("name", ["lm_head.bias", "model.norm.bias", "visual.blocks.0.scale"])
def test_an_unknown_tensor_of_a_part_is_named(tensors, load, name):
    held, path = tensors
    held = {key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
            for key, value in held.items()}  # fmt: skip
    head = {"lm_head.weight": held["model.embed_tokens.weight"].clone()}
    replaced({**head, **held}, name, torch.zeros(1), path)
    with pytest.raises(CheckpointError, match=f"it has {re.escape(name)}, which the model"):
        load(path, name)


def test_a_tensor_under_both_forms_of_its_name_is_rejected(tensors, load):
    held, path = tensors
    both = {**held, **renamed(held)}
    save_file({name: tensor.clone() for name, tensor in both.items()}, path / SINGLE)
    for name in ("visual.", "model."):
        with pytest.raises(CheckpointError, match="it has both "):
            load(path, name)


def test_a_head_of_its_own_is_used_although_the_configuration_ties_it(tensors, family_name, tmp_path):
    held, path = tensors
    config = json.loads((path / "config.json").read_text())
    for each in (config, config["text_config"]):
        each["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    table = next(value for name, value in held.items() if name.endswith("embed_tokens.weight"))
    replaced(held, "lm_head.weight", table.flip(0), path)
    both = Split.load(path, torch.float32)
    asked, params = both.ask(CASES["text"]()), SamplingParams(max_tokens=4, ignore_eos=True)
    assert_same(
        both.answer(asked.prompt, asked.source(), params), both.undivided.run(asked.prompt, asked.prepared, params)
    )


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
