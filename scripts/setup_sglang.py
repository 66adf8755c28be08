"""Makes ``.venv-sglang``: SGLang for CPUs and the project, apart from ``.venv``, as ``requirements-sglang.txt`` says.

Standard library only. Does nothing if the environment is up to date. ``--engines`` adds the engines of the mooncake and
nixl transports and the system libraries that they load. Left out are triton and SGLang's kernels, which no
CPU can use or which are not on PyPI: ``scripts/shims/sglang_cpu.py`` stands in for them. About 1.7 GB in all.
"""

from __future__ import annotations

from pathlib import Path

from engine_env import EngineEnv, run_as_command
from setup_env import ROOT

VERSION = "0.5.23"
CHECK = """
import os
os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
assert torch.version.cuda is None, f"torch {torch.__version__} is built for CUDA; name the index that has its CPU build"
import sglang.srt.disaggregation.encoder.receiver, sglang.srt.disaggregation.encoder.server
import sglang.srt.managers.tokenizer_manager, sglang.srt.managers.scheduler
import embferry.connectors.sglang.plugin, pytest
"""
"""Checks that the environment works, and compiles what a server imports first."""
ENVIRONMENT = EngineEnv(
    engine=f"SGLang {VERSION}",
    takes="a minute or two, 1.7 GB",
    lock=ROOT / "requirements-sglang.txt",
    shims=("torchvision_operators", "sglang_cpu"),
    check=CHECK,
    script=Path(__file__),
)


if __name__ == "__main__":
    run_as_command(ENVIRONMENT, ".venv-sglang")
