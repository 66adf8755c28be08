"""Encoder cache connector for vLLM's encode/prefill/decode split; ``docs/vllm.md`` shows how to start it.

Only ``connector``, ``scheduler_side`` and ``worker_side`` import vLLM. The other modules run without it.
"""
