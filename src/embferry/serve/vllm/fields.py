"""The fields of chat requests that vLLM 0.32 knows. Every field is passed on; those that it ignores are named."""

from __future__ import annotations

from typing import Any

from embferry.serve.openai.fields import LIMITED, NEUTRAL
from embferry.serve.openai.ignored import Ignored

KNOWN = frozenset({
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "chat_template",
    "chat_template_kwargs", "continue_final_message", "documents", "ec_transfer_params", "echo", "frequency_penalty",
    "ignore_eos", "include_reasoning", "include_stop_str_in_output", "kv_transfer_params", "length_penalty",
    "logit_bias", "logprob_token_ids", "logprobs", "max_completion_tokens", "max_tokens", "media_io_kwargs", "messages",
    "min_p", "min_tokens", "mm_payload", "mm_processor_kwargs", "model", "n", "parallel_tool_calls", "presence_penalty",
    "priority", "prompt_logprobs", "reasoning_effort", "repetition_detection", "repetition_penalty", "request_id",
    "response_format", "return_mm_kwargs", "return_prompt_text", "return_token_ids", "return_token_offsets",
    "return_tokens_as_token_ids", "routed_experts_prompt_start", "seed", "session_id", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "stream", "stream_interval", "stream_options",
    "structured_outputs", "temperature", "thinking_token_budget", "tool_choice", "tools", "top_k", "top_logprobs",
    "top_p", "truncate_prompt_tokens", "truncation_side", "use_beam_search", "user", "vllm_xargs", "watermarking",
})  # fmt: skip
"""The fields of vLLM's ``ChatCompletionRequest``."""


def ignored_fields(request: dict[str, Any]) -> Ignored:
    """Returns the fields of a chat request that vLLM ignores, without those that ask for nothing."""
    ignored = Ignored()
    for name, value in request.items():
        if name in KNOWN or name in NEUTRAL or value is None:
            continue
        if name not in LIMITED or not LIMITED[name][0](value):
            ignored.add(name)
    return ignored
