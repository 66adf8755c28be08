"""Changes to SGLang for a fair comparison, as plug-ins that SGLang calls in each of its processes."""

from __future__ import annotations

from typing import Any

GROUP = "sglang.srt.plugins"
RECEIVER = "sglang.srt.disaggregation.encoder.receiver"


def failed_requests_have_tokens() -> None:
    """Keeps a language server alive when a request fails before its embedding is there, to show the transfer alone.

    Such a request has no tokens, and SGLang asks for their number, which ends the scheduler.
    """
    from array import array

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def give_none(self: Any, request: Any) -> None:
        if request.input_ids is None:
            request.input_ids = array("q")

    HookRegistry.register(f"{RECEIVER}.MMReceiverBase.create_req", give_none, HookType.BEFORE)


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
