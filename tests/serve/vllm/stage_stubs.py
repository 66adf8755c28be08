"""Stubs of instances that prefill and decode."""

from __future__ import annotations

from typing import Any

import httpx

from tests.serve.vllm.stubs import Behaviour, Stub, answered, completion, encoder_stubs


def prefilled(**changes: Any) -> Behaviour:
    """Responds as a producer of keys and values does, each time with other blocks. ``changes``: to its parameters."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        if "kv_transfer_params" not in body:
            return await answered()(stub, body)
        params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": stub.host}
        params |= {"remote_block_ids": [[len(stub.requests)]], **changes}
        return httpx.Response(200, json={**completion("a", "length"), "kv_transfer_params": params})

    return behave


def stages(prefills: int = 1, decodes: int = 1, encoders: int = 1) -> tuple[list[Stub], list[Stub], list[Stub]]:
    """Returns stubs that encode (``enc0``), prefill (``pre0``) and decode (``dec0``)."""
    return (
        encoder_stubs(encoders),
        [Stub(f"pre{number}", "prefill", default=prefilled()) for number in range(prefills)],
        [Stub(f"dec{number}", "decode") for number in range(decodes)],
    )


def blocks(body: dict[str, Any]) -> tuple[str, int]:
    """Returns where a decode request's blocks are."""
    params = body["kv_transfer_params"]
    return params["remote_engine_id"], params["remote_block_ids"][0][0]
