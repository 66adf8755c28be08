"""One engine in a process of its own. It reads one order per line, and writes one answer per line.

    python -m tests.connectors.engine_process MODEL '{"transfer": {"ec_role": …}, "options": {…}}'

vLLM has one encoder cache connector per process, so a producer and a consumer cannot share one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from typing import Any, NoReturn

from tests.connectors.observation import Observation

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "limit_mm_per_prompt": {"image": 4, "video": 0},
    "disable_log_stats": False,
    "seed": 0,
}


def main(model: str, transfer: dict[str, Any], options: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    gc.disable()  # millions of long-lived objects are made: collecting would take a fifth of the start
    observation = Observation()
    from vllm import LLM

    more: dict[str, Any] = OPTIONS | options
    if transfer:
        more["ec_transfer_config"] = transfer
    if transfer.get("ec_role") == "ec_consumer":
        more["enable_mm_embeds"] = True
    if more.get("node_rank"):
        _run_ranks(model, more, answers)
    llm = LLM(model=model, **more)
    gc.enable()
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"answers": obey(llm, order, observation), "status": observation.status() | counted(llm)}
        print(json.dumps(answer), file=answers, flush=True)
    gc.freeze()  # the objects end with the process
    llm.llm_engine.engine_core.shutdown()
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    assert left == ["MainThread"], f"still running: {left}"
    sys.stderr.flush()
    os._exit(0)  # finalizing an interpreter with torch takes seconds


def _run_ranks(model: str, options: dict[str, Any], answers: Any) -> NoReturn:
    """Runs the ranks of a host without the scheduler, as ``vllm serve --headless`` does, until the input ends."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = MultiprocExecutor(EngineArgs(model=model, **options).create_engine_config(), monitor_workers=False)
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    sys.stdin.read()
    executor.shutdown()
    sys.stderr.flush()
    os._exit(0)


def obey(llm: Any, order: dict[str, Any], observation: Observation) -> list[dict[str, Any]]:
    """Runs all requests at once. With ``abort``, aborts them as soon as the first byte may arrive."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            extra_args={"ec_transfer_params": request["params"]} if request["params"] else None,
        )
        for request in order["requests"]
    ]
    messages = [[{"role": "user", "content": request["content"]}] for request in order["requests"]]
    if not messages:
        return []
    if not order["abort"]:
        return [summary(output) for output in llm.chat(messages, sampling, use_tqdm=False)]
    before, engine = observation.windows(), llm.llm_engine
    ids = llm.enqueue_chat(messages, sampling, use_tqdm=False)
    outputs = []
    while engine.has_unfinished_requests() and observation.windows() == before:
        outputs += engine.step()
    engine.abort_request(ids, internal=True)
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return [summary(output) for output in outputs if output.finished]


def summary(output: Any) -> dict[str, Any]:
    return {
        "tokens": list(output.outputs[0].token_ids),
        "reason": output.outputs[0].finish_reason,
        "params": output.ec_transfer_params,
    }


def counted(llm: Any) -> dict[str, Any]:
    """Returns some of vLLM's own metrics."""
    names = {"vllm:num_preemptions": "preemptions", "vllm:prefix_cache_hits": "prefix_hits"}
    found: dict[str, Any] = dict.fromkeys(names.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in names:
            found[names[metric.name]] += metric.value
    core = llm.llm_engine.engine_core.engine_core  # in this process
    return found | {"encoder_cache_tokens": core.scheduler.encoder_cache_manager.cache_size}


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
