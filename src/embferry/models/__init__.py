"""The models in the package, by name."""

from __future__ import annotations

from pathlib import Path

DEFAULT_MODEL = "shapes"
"""The name of the default model."""

_PACKAGED = Path(__file__).parent


def packaged_models() -> tuple[str, ...]:
    """Returns the names of the models in the package, sorted."""
    return tuple(sorted(path.parent.name for path in _PACKAGED.glob("*/config.json")))


def model_path(name: str) -> Path:
    """Returns the directory of a model.

    Args:
        name: A packaged model (see :func:`packaged_models`), or a local directory in the Hugging Face layout.

    Returns:
        A directory that contains ``config.json``.

    Raises:
        ValueError: The name is neither a packaged model nor such a directory.
    """
    if name in packaged_models():
        return _PACKAGED / name
    directory = Path(name).expanduser()
    if name and (directory / "config.json").is_file():
        return directory.resolve()
    known = ", ".join(packaged_models())
    raise ValueError(f"no model {name!r}: give a packaged model ({known}) or a directory that contains config.json")
