"""Model directories that the engine cannot run are named, with what it runs, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embferry.models import model_path
from embferry.models.checkpoints import INDEX, WEIGHTS, check_directory

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
        (written("[]"), f"a model without model_type is not supported; {FAMILIES}"),
        (written("{"), "config.json is not valid JSON"),
        (written("[" * 100_000), "config.json is not valid JSON"),
        (without_weights, f"has neither {WEIGHTS} nor {INDEX}"),
        (pickled, "pytorch_model.bin is not read: weights must be in files of safetensors"),
        (sharded, "lacks model-1-of-5.safetensors, model-2-of-5.safetensors, model-3-of-5.safetensors of 5 files"),
        (written("{}", INDEX), f"{INDEX} has no weight_map"),
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


def test_the_check_imports_no_torch() -> None:
    look = "import sys, embferry.models.checkpoints, embferry.models.hub; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
