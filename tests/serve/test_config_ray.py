"""Settings of a deployment on Ray: resources and words in text, bounds in order, options that fit to --on ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError, load

RESOURCES, WORDS = ("ray", "encoder_resources"), ("ray", "vllm_arguments")


def test_resources_and_words_are_read_from_text_and_from_a_file(tmp_path: Path) -> None:
    flags = {RESOURCES: "vision:1, big:0.5", WORDS: "--max-model-len 4096 --name 'two words'"}
    ray = load(flags, {}).settings.ray
    assert ray.encoder_resources == {"vision": 1, "big": 0.5}
    assert ray.vllm_arguments == ("--max-model-len", "4096", "--name", "two words")
    file = tmp_path / "settings.yaml"
    file.write_text("ray:\n  encoder_resources: {vision: 1, big: 0.5}\n  vllm_arguments: [--name, two words]\n")
    from_file = load({}, {}, str(file)).settings.ray
    assert from_file.encoder_resources == ray.encoder_resources
    assert from_file.vllm_arguments == ("--name", "two words")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (RESOURCES, "vision", "Input should be"),
        (RESOURCES, "vision:none", "a valid number"),
        (RESOURCES, ":1", "at least 1 character"),
        (RESOURCES, "vision:0", "greater than 0"),
        (WORDS, "'open", "not words as a shell reads them"),
        (("ray", "min_encoders"), "0", "greater than or equal to 1"),
        (("ray", "min_encoders"), "9", "min_encoders 9 is more than max_encoders 4"),
        (("ray", "encoder_gpus"), "-1", "greater than or equal to 0"),
    ],
)
def test_a_value_that_ray_cannot_take_is_refused_with_the_reason(name: tuple[str, str], text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load({name: text}, {})


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--min-encoders", "2"), "--min-encoders needs --on ray"),
        (("--address", "auto"), "--address needs --on ray"),
        (("--on", "ray", "--encode-workers", "2"), "--encode-workers has no effect with --on ray"),
        (("--on", "ray", "--bootstrap-url", "http://h:1"), "--bootstrap-url has no effect with --on ray"),
        (("--on", "ray", "--engine", "vllm", "--encoders", "2"), "--encoders has no effect with --on ray"),
        (("--on", "mars"), "Input should be 'machine' or 'ray'"),
    ],
)
def test_options_that_do_not_fit_to_where_the_processes_run_are_refused(words: tuple[Any, ...], why: str) -> None:
    outcome = CliRunner().invoke(app, ["serve", *words])
    assert outcome.exit_code == 2
    assert why in " ".join(outcome.stderr.split())


@pytest.mark.parametrize("args", [{"router": {"api_keyy": "SECRET"}}, {"router": "SECRET"}, {"router": ["SECRET"]}])
def test_the_message_of_a_wrong_config_file_has_no_value(args: dict[str, object]) -> None:
    """Ray Serve validates the settings by itself, and shows the message in its log and on its dashboard."""
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate(args)
    assert "router" in str(refused.value)
    assert "SECRET" not in str(refused.value)
