"""One engine in a process of its own: reads a request a line, answers with a line.

    python -m tests.connectors.engine_process MODEL '{"ec_role": …}'

vLLM keeps one encoder cache connector a process, so a producer and a consumer cannot share one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, transfer: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {}
    if transfer:
        more["ec_transfer_config"] = transfer
    if transfer.get("ec_role") == "ec_consumer":
        more["enable_mm_embeds"] = True
    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 4, "video": 0},
        seed=0,
        **more,
    )
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        extra = {"ec_transfer_params": request["params"]} if request.get("params") else None
        sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=extra)
        messages = [{"role": "user", "content": request["content"]}]
        output = llm.chat(messages, sampling, use_tqdm=False)[0]
        answer = {
            "tokens": list(output.outputs[0].token_ids),
            "reason": output.outputs[0].finish_reason,
            "params": output.ec_transfer_params,
        }
        print(json.dumps(answer), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
