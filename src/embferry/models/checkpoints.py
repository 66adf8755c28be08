"""Checks of a model directory that need no torch: its family, and whether all its files are there and can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The families of models that the engine runs, as ``config.json`` names them."""
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
PICTURES, PROCESSOR, TEMPLATE = "preprocessor_config.json", "processor_config.json", "chat_template.jinja"
VIDEOS, OLD_TEMPLATE = "video_preprocessor_config.json", "chat_template.json"
GENERATION = "generation_config.json"
_SPECIAL = ("special_tokens_map.json", "added_tokens.json")
NUMBERS = ("F64", "F32", "F16", "BF16")
"""The types of numbers that weights may have, as safetensors names them."""
MAX_HEADER_BYTES = 100_000_000
"""The longest header that safetensors reads."""
MAX_TEXT_BYTES = 1 << 28
"""Bytes of the largest other file. Tokenizers have a few tens of megabytes."""
_AGAIN = "download the model again, with all of its files"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        file: the name of the file.
        dtype: as safetensors names it.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def check_directory(directory: Path) -> None:
    """Checks a directory in the Hugging Face layout.

    Raises:
        ValueError: the engine cannot run this model; the message names the file and says what to do.
    """
    check_family(directory)
    check_texts(directory)
    check_pictures(directory)
    stored_tensors(directory)


def check_family(directory: Path) -> None:
    """Checks ``config.json`` alone, before the weights are there.

    Raises:
        ValueError: it cannot be read, is of another family, or of quantized weights.
    """
    config = _json(directory / CONFIG)
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in SUPPORTED:
        named = family if isinstance(family, str) and family else "a model without model_type"
        raise ValueError(f"{named} is not supported; {_listed(SUPPORTED)} are ({directory / CONFIG})")
    if config.get("quantization_config"):
        raise ValueError(f"quantized weights are not supported; give the model from which {directory} was quantized")


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if there is no such file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    return _object(path) if path.is_file() else {}


def chat_template(directory: Path) -> Any:
    """Returns the chat template, or the templates by name, of the first file that has one; None if none has."""
    if (directory / TEMPLATE).is_file():
        text = _text(directory / TEMPLATE)
        return text if text.strip() else None
    files = (directory / name for name in (TOKENIZER_CONFIG, OLD_TEMPLATE, PROCESSOR))
    return next((found for file in files if (found := read_object(file).get("chat_template"))), None)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors in the files of weights, by name, without reading them.

    Raises:
        ValueError: a file is missing, damaged or incomplete, or the list of files cannot be read.
    """
    if not (directory / INDEX).is_file():
        if not (directory / WEIGHTS).is_file():
            others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in directory.glob(kind))
            instead = f"{others[0]} is not read: weights must be in files of safetensors" if others else _AGAIN
            raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}; {instead}")
        return _header(directory / WEIGHTS)
    shards = _object(directory / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map; {_AGAIN}")
    names = sorted(set(shards.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory} lacks {_listed(missing[:3])} of {len(names)} files; {_AGAIN}")
    headers = {name: _header(directory / name) for name in names}
    if lost := next((key for key, name in shards.items() if key not in headers[name]), None):
        raise ValueError(f"{directory / shards[lost]} lacks {lost}, which {INDEX} says it has; {_AGAIN}")
    return {key: headers[name][key] for key, name in shards.items()}


def check_texts(directory: Path) -> None:
    """Checks the files of the tokenizer and of the chat template, and the settings of answers.

    Raises:
        ValueError: one is missing or cannot be read. Without ``tokenizer_config.json`` the tokenizer would load, with
            another end token.
    """
    _check_objects(directory, TOKENIZER, TOKENIZER_CONFIG, *_SPECIAL, GENERATION)
    if not all((directory / name).is_file() for name in ("vocab.json", "merges.txt")):
        tokenizer = read_object(directory / TOKENIZER)
        if not tokenizer:
            raise ValueError(f"{directory} lacks {TOKENIZER}; {_AGAIN}")
        if not isinstance(tokenizer.get("model"), dict):
            raise ValueError(f"{directory / TOKENIZER} has no model; {_AGAIN}")
    if not (directory / TOKENIZER_CONFIG).is_file():
        raise ValueError(f"{directory} lacks {TOKENIZER_CONFIG}; {_AGAIN}")
    if not chat_template(directory):
        raise ValueError(
            f"{directory} has no chat template; put the one that the model was trained with into {TEMPLATE}"
        )


def check_pictures(directory: Path) -> None:
    """Checks the settings for pictures and videos.

    Raises:
        ValueError: a file of them is missing or cannot be read.
    """
    _check_objects(directory, PICTURES, PROCESSOR, VIDEOS)
    if not (directory / PICTURES).is_file() and "image_processor" not in read_object(directory / PROCESSOR):
        raise ValueError(f"{directory} lacks {PICTURES}; {_AGAIN}")


def _check_objects(directory: Path, *names: str) -> None:
    """Raises ValueError if one of these files is there and holds no JSON object."""
    for name in names:
        read_object(directory / name)


def _header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file of safetensors, after comparing its header with its size.

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
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if (needed := 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)) > size:
            raise ValueError(f"it has {size:,} of {needed:,} bytes")
        return {
            name: StoredTensor(file.name, tuple(int(side) for side in entry["shape"]), str(entry["dtype"]))
            for name, entry in entries.items()
        }
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        # The messages of the JSON parser mean nothing here.
        why = str(error) if type(error) is ValueError else "its header cannot be read"
        raise ValueError(f"{file} is damaged: {why}; download the model again") from error


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; download the model again")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply; download the model again") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download the model again") from error


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{path} has more than {MAX_TEXT_BYTES:,} bytes; download the model again")
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8; download the model again") from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
