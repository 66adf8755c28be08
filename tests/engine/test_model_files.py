"""JSON files and chat template of a model directory: what is damaged is refused, never read as something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embferry.engine.checkpoint import read_config
from embferry.engine.errors import CheckpointError
from embferry.engine.media import MediaProcessor
from embferry.engine.prompt import PromptBuilder

FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@pytest.fixture
def directory(model_dir: Callable[[str], Path], family_name: str, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("*.safetensors*")
    return Path(shutil.copytree(model_dir(family_name), tmp_path / "model", ignore=ignored))


def changed(file: Path, **values: Any) -> None:
    """Changes entries of a JSON file; None removes one."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({key: value for key, value in {**held, **values}.items() if value is not None}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"text"'])
def test_a_file_that_holds_no_json_object_is_named(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name} (is not valid JSON|holds no JSON object)"):
        (PromptBuilder if name.startswith("tokenizer") else MediaProcessor).load(directory)


@pytest.mark.parametrize("model", [{"type": "BPE"}, {"type": "no such"}, {}, "text", None])
def test_a_tokenizer_that_cannot_be_loaded_is_refused(directory: Path, model: Any) -> None:
    changed(directory / "tokenizer.json", model=model)
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer in [^\\\n]*$"):
        PromptBuilder.load(directory)


@pytest.mark.parametrize("text", ["[]", "null", '{"model_type": "qwen2_vl", "text_config": 5}'])
def test_a_configuration_of_other_values_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot read the configuration"):
        read_config(directory)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": {"height": 4}}, "cannot read the preprocessor settings"),
        ({"size": 5}, "cannot read the preprocessor settings"),
        ({"patch_size": "wide"}, "cannot read the preprocessor settings"),
        ({"patch_size": 14}, "cut pictures into patches of other sizes"),
        ({"patch_size": None}, "cut pictures into patches of other sizes"),
        ({"merge_size": 1}, "cut pictures into patches of other sizes"),
        ({"temporal_patch_size": 1}, "cut pictures into patches of other sizes"),
    ],
)
def test_preprocessor_settings_that_do_not_fit_are_refused(directory: Path, settings: Any, sentence: str) -> None:
    changed(directory / "preprocessor_config.json", **settings)
    with pytest.raises(CheckpointError, match=sentence):
        MediaProcessor.load(directory)


def test_settings_of_a_processor_go_before_those_of_their_own_files(directory: Path) -> None:
    pictures = json.loads((directory / "preprocessor_config.json").read_text())
    videos = {"size": {"shortest_edge": 16 * 16, "longest_edge": 16 * 16}, "fps": 7}
    changed(directory / "processor_config.json", image_processor=pictures, video_processor=videos)
    (directory / "preprocessor_config.json").unlink()
    media = MediaProcessor.load(directory)
    assert media.frame_sampling.fps == 7
    assert media.tokens_of((64, 64), 2) == 1


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json", "processor_config.json"])
def test_a_chat_template_in_another_file_gives_the_same_prompt(directory: Path, name: str) -> None:
    messages = [{"role": "user", "content": "which colour is it?"}]
    expected = PromptBuilder.load(directory).build(messages).input_ids.tolist()
    template = directory / "chat_template.jinja"
    changed(directory / name, chat_template=template.read_text())
    template.unlink()
    assert PromptBuilder.load(directory).build(messages).input_ids.tolist() == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in %}",
        "{{ raise_exception('no') }}",
        "<html>404</html>",
        "{% for message in messages %}{{ message.content[1].text }}{% endfor %}",
        "{% for message in messages %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}",
    ],
)
def test_a_chat_template_that_leaves_out_what_is_asked_is_refused(directory: Path, template: str) -> None:
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=r"the chat template in .*; put the one that the model was trained with"):
        PromptBuilder.load(directory)


def test_a_tokenizer_of_another_model_is_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    changed(directory / "config.json", image_token_id=100_000)
    with pytest.raises(CheckpointError, match="it has no token image_token_id"):
        PromptBuilder.load(directory)
    changed(directory / "config.json", **config)
    size = config["text_config"]["vocab_size"]
    changed(directory / "config.json", text_config={**config["text_config"], "vocab_size": size - 1})
    with pytest.raises(CheckpointError, match=f"it has token {size - 1}, and the model those below {size - 1}"):
        PromptBuilder.load(directory)
