"""Changes to vLLM for a comparison, found only by processes that have :func:`folder` on their ``PYTHONPATH``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

NAME = "embferry-bench"


def folder(parent: Path, *plugins: ModuleType) -> Path:
    """A folder that makes them plug-ins of who has it on its path: vLLM calls their ``register`` in each process."""
    made = parent / "plugin"
    described = made / f"{NAME.replace('-', '_')}-0.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    entries = [f"{NAME}-{plugin.__name__.rpartition('.')[2]} = {plugin.__name__}:register" for plugin in plugins]
    (described / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *entries, ""]))
    return made
