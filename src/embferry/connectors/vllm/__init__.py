"""Encoder cache connector for vLLM's encode/prefill/decode split; ``docs/vllm.md`` shows how to start it.

Only ``connector``, ``scheduler_side``, ``worker_side`` and ``picture_rule`` import vLLM. The other modules run without
it.
"""
