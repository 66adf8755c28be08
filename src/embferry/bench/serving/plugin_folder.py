"""A folder that makes an engine call functions of the benchmark in each of its processes, as plug-ins.

Only processes with the folder on their ``PYTHONPATH`` find them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

NAME = "embferry-bench"


def plugin_folder(parent: Path, group: str, *plugins: Callable[[], None]) -> Path:
    """Makes a folder with the metadata of a package whose plug-ins are ``plugins``, and returns it.

    Args:
        parent: Where the folder is made.
        group: The group of entry points in which the engine looks for plug-ins.
        plugins: Functions of modules that the engine's processes can import.
    """
    made = parent / "plugin"
    described = made / f"{NAME.replace('-', '_')}-0.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    entries = [f"{NAME}-{plugin.__name__} = {plugin.__module__}:{plugin.__name__}" for plugin in plugins]
    (described / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries, ""]))
    return made
