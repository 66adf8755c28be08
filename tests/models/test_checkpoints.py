"""Model directories that the engine cannot run are named, with what it runs, before torch is imported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embferry.models import model_path
from embferry.models.checkpoints import INDEX, WEIGHTS, chat_template, check_directory

FAMILIES = "qwen2_vl, qwen2_5_vl, qwen3_vl are"


def written(text: str, name: str = "config.json") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def sharded(folder: Path) -> None:
    shards = {f"t{number}": f"model-{number}-of-5.safetensors" for number in range(1, 6)}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def shortened(length: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[:length])

    return cut


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path("shapes"), tmp_path / "model"))


def test_the_packaged_model_is_fine(directory: Path) -> None:
    check_directory(directory)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (written('{"model_type": "bert"}'), f"bert is not supported; {FAMILIES}"),
        (written("{}"), f"a model without model_type is not supported; {FAMILIES}"),
        (
            written('{"model_type": "qwen3_vl", "quantization_config": {"quant_method": "fp8"}}'),
            "quantized weights are not",
        ),
        (written("[]"), f"a model without model_type is not supported; {FAMILIES}"),
        (written("{"), "config.json is not valid JSON"),
        (written("[" * 100_000), "config.json is not valid JSON"),
        (without_weights, f"has neither {WEIGHTS} nor {INDEX}"),
        (pickled, "pytorch_model.bin is not read: weights must be in files of safetensors"),
        (sharded, "lacks model-1-of-5.safetensors, model-2-of-5.safetensors, model-3-of-5.safetensors of 5 files"),
        (written("{}", INDEX), f"{INDEX} has no weight_map"),
        (written("[]", INDEX), f"{INDEX} holds no JSON object"),
        (written(json.dumps({"weight_map": {"t0": WEIGHTS}}), INDEX), f"{WEIGHTS} lacks t0, which {INDEX} says it has"),
        (shortened(0), f"{WEIGHTS} is damaged: it is no file of safetensors"),
        (shortened(1000), f"{WEIGHTS} is damaged: its header cannot be read"),
        (shortened(200_000), f"{WEIGHTS} is damaged: it has 200,000 of "),
        (written("version https://git-lfs.github.com/spec/v1", WEIGHTS), "it is no file of safetensors"),
    ],
)
def test_each_fault_is_named(directory: Path, change: Callable[[Path], None], sentence: str) -> None:
    change(directory)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is what is tested
        check_directory(directory)
    assert sentence in str(refused.value)


NEEDED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
OPTIONAL = (
    "generation_config.json", "video_preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def refusal(directory: Path) -> str:
    """Returns the sentence with which a directory is refused, which names it and says what to do."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is what is tested
        check_directory(directory)
    sentence = str(refused.value)
    assert str(directory) in sentence
    assert re.search("; (download the model again|put the one that the model was trained with into )", sentence)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", NEEDED)
def test_a_file_that_is_missing_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert f"lacks {name}" in refusal(directory)


@pytest.mark.parametrize("name", [*NEEDED, *OPTIONAL])
@pytest.mark.parametrize("text", ["", "{", "<html>", "[]", "5", "null", '"text"', "[" * 100_000])
def test_a_file_that_holds_no_json_object_is_named(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(text)
    assert re.search(f"{name} (is not valid JSON|holds no JSON object)", refusal(directory))


@pytest.mark.parametrize("name", [*NEEDED, *OPTIONAL, "chat_template.jinja"])
def test_a_file_that_is_no_text_is_named(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"\xff\xfe\x00")
    assert f"{name} is no text" in refusal(directory)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_file_that_the_model_can_do_without_is_not_missed(directory: Path, name: str) -> None:
    (directory / name).unlink(missing_ok=True)
    check_directory(directory)


def test_a_tokenizer_may_be_of_words_and_merges(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text("{}")
    assert "lacks tokenizer.json" in refusal(directory)
    (directory / "merges.txt").write_text("")
    check_directory(directory)


def test_settings_for_pictures_may_be_those_of_a_processor(directory: Path) -> None:
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    check_directory(directory)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json"]
)
def test_the_chat_template_is_found_wherever_models_have_it(directory: Path, name: str) -> None:
    template = directory / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    assert "has no chat template" in refusal(directory)
    file = directory / name
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(text if name.endswith("jinja") else json.dumps({**held, "chat_template": text}))
    check_directory(directory)
    assert chat_template(directory) == text


def test_an_empty_chat_template_is_none(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(" \n")
    assert "has no chat template" in refusal(directory)


def test_a_directory_without_a_configuration_is_named(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=f"^{re.escape(str(directory))} .* lacks config.json$"):
        model_path(str(directory))


def test_the_check_imports_no_torch() -> None:
    look = "import sys, embferry.models.checkpoints, embferry.models.hub; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
