"""Checks of a model directory that need no torch: its family, and whether its files of weights are all there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The families of models that the engine runs, as ``config.json`` names them."""
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The longest header that safetensors reads."""


def check_directory(directory: Path) -> None:
    """Checks a directory in the Hugging Face layout.

    Raises:
        ValueError: the engine cannot run this model; the message says why and what it runs.
    """
    check_family(directory)
    for file in _weights(directory):
        _check_weights(file)


def check_family(directory: Path) -> None:
    """Checks ``config.json`` alone, before the weights are there.

    Raises:
        ValueError: it cannot be read, or is of another family.
    """
    config = _json(directory / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in SUPPORTED:
        named = family if isinstance(family, str) and family else "a model without model_type"
        raise ValueError(f"{named} is not supported; {_listed(SUPPORTED)} are ({directory / 'config.json'})")


def _weights(directory: Path) -> list[Path]:
    """Returns the files of weights.

    Raises:
        ValueError: one is missing, or the list of them cannot be read.
    """
    if not (directory / INDEX).is_file():
        names = [WEIGHTS]
    else:
        index = _json(directory / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{directory / INDEX} has no weight_map; download the model again")
        names = sorted(set(shards.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing == [WEIGHTS]:
        others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in directory.glob(kind))
        instead = f"; {others[0]} is not read: weights must be in files of safetensors" if others else ""
        raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}{instead}")
    if missing:
        raise ValueError(f"{directory} lacks {_listed(missing[:3])} of {len(names)} files; download the model again")
    return [directory / name for name in names]


def _check_weights(file: Path) -> None:
    """Compares the header of a file of safetensors with its size.

    Raises:
        ValueError: it is damaged or incomplete.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError("it is no file of safetensors")
            header = json.loads(opened.read(length))
            size = os.fstat(opened.fileno()).st_size
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if (needed := 8 + length + max(ends, default=0)) > size:
            raise ValueError(f"it has {size:,} of {needed:,} bytes")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        # The messages of the JSON parser mean nothing here.
        why = str(error) if type(error) is ValueError else "its header cannot be read"
        raise ValueError(f"{file} is damaged: {why}; download the model again") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download the model again") from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
