"""A change to SGLang without which its mooncake back-end does not start on a CPU, as a plug-in that SGLang calls."""

from __future__ import annotations

from typing import Any

GROUP = "sglang.srt.plugins"
RECEIVER = "sglang.srt.disaggregation.encoder.receiver"


def pool_in_host_memory() -> None:
    """Puts the pool of the mooncake back-end into host memory: SGLang allocates it on a GPU only."""
    import torch
    from sglang.srt.disaggregation.encoder.receiver import EmbeddingPool
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    class HostPool(EmbeddingPool):  # type: ignore[misc]  # SGLang is not there when types are checked
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            make = torch.empty
            vars(torch)["empty"] = lambda *size, **more: make(*size, **more | {"device": "cpu"})
            try:
                super().__init__(*args, **kwargs)
            finally:
                vars(torch)["empty"] = make

    HookRegistry.register(f"{RECEIVER}.EmbeddingPool", HostPool, HookType.REPLACE)
