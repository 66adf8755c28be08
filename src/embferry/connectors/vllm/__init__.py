"""An encoder cache connector for vLLM's encode/prefill/decode split. docs/vllm.md says how to start it.

Only ``connector``, ``scheduler_side`` and ``worker_side`` import vLLM; the rest is ordinary code of ours.
"""
