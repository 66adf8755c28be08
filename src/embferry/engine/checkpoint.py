"""Loads one half of a model; only the tensors of that half are opened in the safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from embferry.engine.errors import CheckpointError
from embferry.engine.families.base import PREFIX_OF, Family, Part
from embferry.engine.progress import Progress
from embferry.models.checkpoints import NUMBERS, stored_tensors


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's text; the others of transformers' give advice that does not fit."""
    return next(iter(str(error).replace("\\n", "\n").splitlines()), "") or type(error).__name__


def read_config(path: str | os.PathLike[str]) -> Any:
    """Returns the configuration of a model directory, which need not contain the weights.

    Raises:
        CheckpointError: ``config.json`` is missing or cannot be read.
    """
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path} contains no config.json; give the directory of a model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # values of other types end in errors of huggingface_hub, which have no other base
        raise CheckpointError(f"cannot read the configuration in {path}: {first_line(error)}") from error


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
        try:
            self._stored = stored_tensors(self.path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def has(self, family: Family, part: Part) -> bool:
        """Returns whether the files have a tensor of a part."""
        return bool(self._keys(family, part))

    def read(
        self,
        family: Family,
        part: Part,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        is_all: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Returns tensors of one part in ``dtype``, by their names in that part.

        A tensor that has this dtype in the file is a view of the mapped file, as after ``from_pretrained``. Exactness
        needs this, because a matrix product sums in another order when its operands are aligned differently in memory.

        Args:
            family: Adapter of the model's family.
            part: The part.
            dtype: Dtype of the returned tensors.
            shapes: By name, the shape that each tensor has according to ``config.json``.
            is_all: Whether these are all tensors of the part.

        Raises:
            CheckpointError: A tensor is missing or unknown, has another shape, or values that are no finite numbers.
        """
        keys = self._keys(family, part)
        self._check(part, keys, shapes, is_all)
        wanted: dict[str, list[str]] = {}
        for name in shapes:
            wanted.setdefault(self._stored[keys[name]].file, []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        progress = Progress(f"tensors of the {part.value} part", len(shapes))
        try:
            for shard, names in wanted.items():
                with safe_open(self.path / shard, framework="pt") as file:
                    for name in names:
                        tensors[name] = file.get_tensor(keys[name]).to(dtype)
                        if not all(torch.isfinite(edge) for edge in torch.aminmax(tensors[name])):
                            raise self._wrong(f"{keys[name]} has values that are infinite or no numbers")
                        progress.step(tensors[name].nbytes)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        return tensors

    def build(self, family: Family, part: Part, cls: Any, config: Any, dtype: torch.dtype, attn: str) -> Any:
        """Returns a model of class ``cls`` that uses the tensors of one part as :meth:`read` returns them.

        No memory is allocated for parameters. Arguments and errors are those of :meth:`read`.
        """
        with torch.device("meta"):
            model = cls._from_config(config, attn_implementation=attn)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.read(family, part, dtype, shapes), assign=True)
        # Rotary frequencies are computed and not stored, so the modules that own them are built anew, off the meta
        # device.
        for name, module in list(model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, type(module)(module.config))
        return model.eval().requires_grad_(False)

    def _keys(self, family: Family, part: Part) -> dict[str, str]:
        """Returns the names in the files of the tensors of a part, by their names in the part."""
        keys: dict[str, str] = {}
        for key in self._stored:
            placed = family.place(key)
            if placed is not None and placed[0] is part and keys.setdefault(placed[1], key) != key:
                raise self._wrong(f"it has both {keys[placed[1]]} and {key}, which are one tensor")
        return keys

    def _check(self, part: Part, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], is_all: bool) -> None:
        prefix = next((key.removesuffix(name) for name, key in keys.items()), PREFIX_OF[part])
        if missing := [prefix + name for name in shapes if name not in keys]:
            raise self._wrong(f"it lacks {_some(missing)}")
        if is_all and (unknown := [key for name, key in keys.items() if name not in shapes]):
            raise self._wrong(f"it has {_some(unknown)}, which the model of its config.json does not have")
        for name, shape in shapes.items():
            stored = self._stored[keys[name]]
            if stored.shape != shape:
                raise self._wrong(f"{keys[name]} is {_sides(stored.shape)}, and {_sides(shape)} by its config.json")
            if stored.dtype not in NUMBERS:
                accepted = ", ".join(NUMBERS)
                raise self._wrong(f"{keys[name]} has numbers of the type {stored.dtype}; those read are {accepted}")

    def _wrong(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"the model in {self.path} cannot be run: {sentence}; download it again")


def _sides(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return f"{', '.join(shown[:3])} and {len(shown) - 3} more" if len(shown) > 3 else ", ".join(shown)
