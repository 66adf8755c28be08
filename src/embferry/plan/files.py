"""Files that a plan reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embferry.bench.results import read_file
from embferry.models import model_path
from embferry.models.checkpoints import CONFIG, PICTURES, PROCESSOR, read_object
from embferry.models.hub import download_settings, is_hub_name

from .errors import ModelUnknown, SpeedsInvalid
from .model import Model, model
from .speeds import Speeds, decoded


def read_model(name: str) -> Model:
    """Reads a model's configuration.

    Args:
        name: A model as everywhere, or a ``config.json``; the settings of its processor are beside it.

    Raises:
        ModelUnknown: there is no such model, or its files do not have what a plan needs.
    """
    try:
        path = Path(name).expanduser()
        is_file = path.is_file()
        folder = path.parent if is_file else _folder(name)
        config = read_object(path if is_file else folder / CONFIG)
        processor = read_object(folder / PICTURES) | _of_pictures(read_object(folder / PROCESSOR))
    except (OSError, ValueError) as error:
        raise ModelUnknown(str(error)) from error
    return model(name, config, processor)


def _folder(name: str) -> Path:
    """Returns the directory of a model; of one on the hub that is not here yet, the settings are downloaded.

    Raises:
        ValueError: there is none.
    """
    try:
        return model_path(name)
    except ValueError:
        if not is_hub_name(name) or Path(name).expanduser().is_dir():
            raise
        return download_settings(name)


def read_speeds(path: Path) -> Speeds:
    """Reads a file that ``embferry plan --measure`` has written.

    Raises:
        SpeedsInvalid: it cannot be read.
    """
    try:
        return decoded(read_file(path), str(path))
    except ValueError as error:
        raise SpeedsInvalid(str(error)) from error
    except OSError as error:
        raise SpeedsInvalid(f"{path} cannot be read: {error.strerror or error}") from error


def _of_pictures(processor: dict[str, Any]) -> dict[str, Any]:
    found = processor.get("image_processor")
    return found if isinstance(found, dict) else {}
