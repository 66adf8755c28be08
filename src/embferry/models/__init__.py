"""Models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

DEFAULT_MODEL = "shapes"
"""The name of the model that is used when none is named."""

_PACKAGED = Path(__file__).parent


def packaged_models() -> tuple[str, ...]:
    """Names of the models in the package, sorted."""
    return tuple(sorted(path.parent.name for path in _PACKAGED.glob("*/config.json")))


def model_path(name: str) -> Path:
    """The directory of a model.

    Args:
        name: a packaged model (see `packaged_models`), or a local directory in the Hugging Face layout.

    Returns:
        A directory that holds `config.json`.

    Raises:
        ValueError: neither a packaged model nor such a directory.
    """
    if name in packaged_models():
        return _PACKAGED / name
    directory = Path(name).expanduser()
    if name and (directory / "config.json").is_file():
        return directory.resolve()
    known = ", ".join(packaged_models())
    raise ValueError(f"no model {name!r}: name a packaged model ({known}) or a directory that holds config.json")
