"""The models in the package, by name."""

from __future__ import annotations

from pathlib import Path

from embferry.models.hub import cached, is_hub_name

DEFAULT_MODEL = "shapes"
"""The name of the default model."""

_PACKAGED = Path(__file__).parent


def packaged_models() -> tuple[str, ...]:
    """Returns the names of the models in the package, sorted."""
    return tuple(sorted(path.parent.name for path in _PACKAGED.glob("*/config.json")))


def model_path(name: str) -> Path:
    """Returns the directory of a model.

    Args:
        name: A packaged model (see :func:`packaged_models`), a local directory in the Hugging Face layout, or a name of
            the Hugging Face Hub, such as ``Qwen/Qwen2-VL-2B-Instruct``, whose files are in the local cache.

    Returns:
        A directory that contains ``config.json``.

    Raises:
        ValueError: The name is none of these.
    """
    if name in packaged_models():
        return _PACKAGED / name
    directory = Path(name).expanduser()
    if name and (directory / "config.json").is_file():
        return directory.resolve()
    if is_hub_name(name) and (found := cached(name)) is not None and (found / "config.json").is_file():
        return found
    if name and directory.is_dir():
        raise ValueError(f"{directory} is no directory of a model: it lacks config.json")
    known = ", ".join(packaged_models())
    raise ValueError(
        f"no model {name!r}: give a packaged model ({known}), a directory that contains config.json, or a name of the "
        "Hugging Face Hub, such as Qwen/Qwen2-VL-2B-Instruct"
    )
