"""Tokens of a picture and bytes of a token, by the model's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from embferry.engine.media import MediaProcessor
from embferry.models import model_path
from embferry.plan.errors import ModelUnknown, WorkloadInvalid
from embferry.plan.files import read_model
from embferry.plan.model import model

CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "torch_dtype": "bfloat16",
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
}
"""As Qwen2.5-VL-3B's."""


def test_the_packaged_model() -> None:
    found = read_model("shapes")
    assert found.token_bytes == 128 * 3 * 2, "hidden states and two deepstack levels, in bfloat16"
    assert found.tokens(128, 128) == 64


def test_a_config_alone_has_the_limits_of_its_family() -> None:
    found = model("m", CONFIG, {})
    assert (found.token_bytes, found.tokens(1024, 768)) == (4096, 37 * 27)
    assert found.tokens(100_000, 75_000) <= 16384


@pytest.mark.parametrize(
    "processor",
    [
        {"min_pixels": 3136, "max_pixels": 28 * 28 * 100},
        {"size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 100}},
    ],
)
def test_the_limits_of_the_processor_go_before_those_of_the_family(processor: dict[str, Any]) -> None:
    assert model("m", CONFIG, processor).tokens(4000, 3000) <= 100


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (333, 1000), (4000, 3000), (30, 30)])
def test_tokens_are_those_of_the_engine(size: tuple[int, int]) -> None:
    media = MediaProcessor.load(model_path("shapes"))
    factor = media.patch_size * media.merge_size
    height, width = smart_resize(size[1], size[0], factor, *media._pixels_of_picture)
    assert read_model("shapes").tokens(*size) == height // factor * (width // factor)


def test_dtype_and_widths_of_nested_texts() -> None:
    config = CONFIG | {"text_config": {"hidden_size": 64, "dtype": "float32"}, "torch_dtype": None}
    assert model("m", config, {}).token_bytes == 256


def test_a_file_of_config_has_its_processor_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 78400}')
    assert read_model(str(tmp_path / "config.json")).tokens(4000, 3000) <= 100
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_pixels": 39200}}')
    assert read_model(str(tmp_path)).tokens(4000, 3000) <= 50


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": 8}', '{"vision_config": {"patch_size": 14}}'])
def test_files_without_the_numbers_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnknown):
        read_model(str(tmp_path))


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelUnknown, match="give a packaged model"):
        read_model("/nowhere/at/all")


def test_a_family_without_a_rule_wants_the_number_of_tokens() -> None:
    found = model("llava", CONFIG | {"model_type": "llava"}, {})
    assert found.token_bytes == 4096
    with pytest.raises(ModelUnknown, match="--image-tokens"):
        found.tokens(336, 336)


def test_a_picture_that_the_processor_refuses_is_refused() -> None:
    with pytest.raises(WorkloadInvalid, match="--size 3000x10"):
        model("m", CONFIG, {}).tokens(3000, 10)
