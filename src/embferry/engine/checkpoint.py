"""Loads one half of a model; only the tensors of that half are opened in the safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from embferry.engine.errors import CheckpointError
from embferry.engine.families.base import Family, Part
from embferry.engine.progress import Progress

SINGLE = "model.safetensors"


def read_config(path: str | os.PathLike[str]) -> Any:
    """Returns the configuration of a model directory, which need not contain the weights.

    Raises:
        CheckpointError: ``config.json`` is missing or cannot be read.
    """
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path} contains no config.json; give the directory of a model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration in {path}: {error}") from error


class Checkpoint:
    """The files of a model directory.

    Args:
        path: Directory with ``config.json`` and either ``model.safetensors`` or its shards and their index.

    Raises:
        CheckpointError: A file is missing or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = read_config(path)
        self._shards: dict[str, str] = {}  # tensor name → file name
        index = self.path / f"{SINGLE}.index.json"
        try:
            if index.is_file():
                self._shards = json.loads(index.read_text("utf-8"))["weight_map"]
            else:
                with safe_open(self.path / SINGLE, framework="pt") as file:
                    self._shards = dict.fromkeys(file.keys(), SINGLE)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the list of tensors in {self.path}: {error}") from error

    def read(self, family: Family, part: Part, dtype: torch.dtype, only: str | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors of one part in ``dtype``, by their names in that part; ``only`` the one of this name.

        A tensor that has this dtype in the file is a view of the mapped file, as after ``from_pretrained``. Exactness
        needs this, because a matrix product sums in another order when its operands are aligned differently in memory.
        """
        wanted: dict[str, dict[str, str]] = {}
        for key, shard in self._shards.items():
            placed = family.place(key)
            if placed is not None and placed[0] is part and only in (None, placed[1]):
                wanted.setdefault(shard, {})[key] = placed[1]
        tensors: dict[str, torch.Tensor] = {}
        progress = Progress(f"tensors of the {part.value} part", sum(map(len, wanted.values())))
        try:
            for shard, names in wanted.items():
                with safe_open(self.path / shard, framework="pt") as file:
                    for key, name in names.items():
                        tensors[name] = file.get_tensor(key).to(dtype)
                        progress.step(tensors[name].nbytes)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        return tensors


def build(cls: Any, config: Any, tensors: dict[str, torch.Tensor], attn: str) -> Any:
    """Returns a model of class ``cls`` that uses ``tensors`` as they are, without allocating memory for parameters.

    Raises:
        CheckpointError: A parameter is missing, unknown, or has another shape.
    """
    with torch.device("meta"):
        model = cls._from_config(config, attn_implementation=attn)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit its config.json: {error}") from error
    if missing or unexpected:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)} and has an unknown {_some(unexpected)}")
    # Rotary frequencies are computed and not stored, so the modules that own them are built anew, off the meta device.
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, type(module)(module.config))
    return model.eval().requires_grad_(False)


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return f"{', '.join(shown[:3])} and {len(shown) - 3} more" if len(shown) > 3 else ", ".join(shown) or "nothing"
