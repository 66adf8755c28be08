"""The fields of chat requests that vLLM 0.32 or OpenAI know. All are passed on; others are named in the answer."""

from __future__ import annotations

from typing import Any

from embferry.serve.openai.fields import LIMITED, NEUTRAL
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.request import ChatRequest

_MORE = frozenset({"response_format", "structured_outputs", "request_id"})
_OF_OTHERS = frozenset({
    "ebnf", "stop_regex", "no_stop_trim", "lora_path", "session_params", "custom_logit_processor", "custom_params",
    "return_hidden_states", "return_routed_experts", "return_cached_tokens_details", "guided_grammar",
    "guided_whitespace_pattern", "guided_decoding_backend", "extra_key", "separate_reasoning", "stream_reasoning",
    "prompt_embeds", "best_of",
})  # fmt: skip
"""Fields of SGLang, of other paths, and of earlier versions, which vLLM ignores."""
KNOWN = (frozenset(ChatRequest.model_fields) | LIMITED.keys() | NEUTRAL | _MORE) - _OF_OTHERS


def unknown_fields(request: dict[str, Any]) -> Ignored:
    """Returns the fields of a chat request that vLLM ignores."""
    unknown = Ignored()
    for name, value in request.items():
        if name not in KNOWN and value is not None:
            unknown.add(name)
    return unknown
