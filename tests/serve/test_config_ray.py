"""Settings of a deployment on Ray: resources and words in text, bounds in order, options that fit to --on ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError, load, of_mapping

RESOURCES, WORDS = ("ray", "encoder_resources"), ("ray", "vllm_arguments")

COUNTS = ("routers", "min_encoders", "max_encoders", "min_languages", "max_languages")
PARTS, OWN = ("router", "encoder", "language"), ("CPU", "GPU", "memory", "object_store_memory", "bundle")


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
        (("ray", "encoder_gpus"), "1.5", "whole GPUs, or a part of one; write 2"),
        (("ray", "language_gpus"), "2.5", "whole GPUs, or a part of one; write 3"),
        (("ray", "encoder_cpus"), "0.00001", "no amounts between 0 and 0.0001"),
        (RESOURCES, "vision:0.00001", "no amounts between 0 and 0.0001"),
        (RESOURCES, "vision:1e9", "less than or equal to 1000000"),
        *((("ray", name), "1001", "less than or equal to 1000") for name in COUNTS),
        *(
            (("ray", f"{part}_resources"), f"{name}:1", f"{name} is a resource of Ray's own")
            for part in PARTS
            for name in OWN
        ),
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
    """Ray Serve shows it in its log and on its dashboard."""
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate(args)
    with pytest.raises(ConfigError) as told:
        of_mapping(args, "args")
    for error in (refused.value, told.value):
        assert "router" in str(error)
        assert "SECRET" not in str(error)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"modell": "shapes"}, r"^args\.modell: no such setting; did you mean model\?$"),
        ({"max_encoders": 2}, r"^args\.max_encoders: no such setting; did you mean ray\.max_encoders\?$"),
        ({"ray": {"max_encoder": 2}}, r"^args\.ray\.max_encoder: no such setting; did you mean max_encoders\?$"),
        ({"ray": {"work_per_encoder": 0}}, r"^args\.ray\.work_per_encoder: .*greater than 0"),
        ({"ray": 3}, r"^args\.ray: must hold names and values$"),
        ({"ray": {1: 2}}, r"^args\.ray\.1: no such setting"),
    ],
)
def test_mistakes_in_a_part_of_another_file_are_named_as_they_stand_there(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        of_mapping(values, "args")


def test_a_part_of_another_file_has_the_same_settings_as_a_settings_file(tmp_path: Path) -> None:
    values = {"model": "shapes", "transfer": None, "ray": {"max_encoders": 2, "encoder_resources": {"vision": 1}}}
    file = tmp_path / "settings.yaml"
    file.write_text("model: shapes\ntransfer:\nray:\n  max_encoders: 2\n  encoder_resources: {vision: 1}\n")
    found = of_mapping(values, "args")
    assert found.model_dump() == load({}, {}, str(file)).settings.model_dump()
    assert found.place("ray", "max_encoders") == "args.ray.max_encoders"
    assert found.place("security", "cluster_key_file") == "args.security.cluster_key_file"


def test_a_secret_in_a_part_of_another_file_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"args\.router\.api_key") as error:
        of_mapping({"router": {"api_key": "secret\n\u00e9"}}, "args")
    assert "secret" not in str(error.value)
