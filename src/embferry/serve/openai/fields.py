"""The fields of requests that vLLM, SGLang or OpenAI know, and what becomes of them on our own engine.

Fields that work are those of the models in :mod:`.request`. A field in ``LIMITED`` is refused by name unless its value
asks for nothing. A field in ``NEUTRAL`` asks for nothing that could change an answer here. Any other is ignored, and
named in the response's header ``Embferry-Ignored-Fields``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.openai.ignored import Ignored


def _empty(value: Any) -> bool:
    return not value


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


Rule = tuple[Callable[[Any], bool], str]

LIMITED: dict[str, Rule] = {
    # OpenAI
    "tools": (_empty, "no tools"),
    "functions": (_empty, "no functions"),
    "tool_choice": (_is("none", "auto"), "no tools"),
    "function_call": (_is("none", "auto"), "no functions"),
    "modalities": (lambda v: v == ["text"], "text only"),
    "audio": (_empty, "text only"),
    "prediction": (_empty, "no predicted output"),
    "web_search_options": (_empty, "no search"),
    "reasoning_effort": (_is("none"), "no reasoning"),
    "verbosity": (_is("medium"), "only medium"),
    "service_tier": (_is("auto", "default"), "one tier"),
    "store": (_empty, "nothing is stored"),
    # vLLM, some of them also SGLang's
    "use_beam_search": (_empty, "no beam search"),
    "best_of": (_is(1), "as many as n"),
    "length_penalty": (lambda v: v == 1, "no beam search"),
    "bad_words": (_empty, "logit_bias bans tokens"),
    "spaces_between_special_tokens": (_is(True), "always with spaces"),
    "truncate_prompt_tokens": (_empty, "a prompt is never cut"),
    "prompt_logprobs": (lambda v: v is False, "log probabilities of the answer only: logprobs"),
    "logprob_token_ids": (_empty, "the likeliest tokens only: top_logprobs"),
    "echo": (_empty, "the answer only"),
    "add_special_tokens": (_empty, "as the chat template says"),
    "documents": (_empty, "no documents"),
    "chat_template": (_empty, "the model's own"),
    "chat_template_kwargs": (_empty, "none"),
    "media_io_kwargs": (_empty, "the server's settings"),
    "mm_processor_kwargs": (_empty, "the model's own"),
    "priority": (_is(0), "requests take turns"),
    "return_tokens_as_token_ids": (_empty, "the field embferry has the ids"),
    "return_token_ids": (_empty, "the field embferry has the ids"),
    "return_prompt_text": (_empty, "the answer only"),
    "return_token_offsets": (_empty, "the answer only"),
    "kv_transfer_params": (_is(), "none"),
    "ec_transfer_params": (_is(), "none"),
    "vllm_xargs": (_empty, "none"),
    "repetition_detection": (_empty, "penalties"),
    "thinking_token_budget": (_empty, "no reasoning"),
    "watermarking": (_empty, "none"),
    "stream_interval": (_is(1), "every token"),
    "guided_grammar": (_empty, "json, regex, choice"),
    "guided_whitespace_pattern": (_empty, "none"),
    "prompt_embeds": (_is(), "text and media"),
    # SGLang
    "ebnf": (_empty, "json, regex, choice"),
    "structural_tag": (_empty, "json, regex, choice"),
    "stop_regex": (_empty, "stop"),
    "no_stop_trim": (_empty, "include_stop_str_in_output"),
    "lora_path": (_empty, "one model"),
    "session_params": (_empty, "no sessions"),
    "custom_logit_processor": (_empty, "none"),
    "custom_params": (_empty, "none"),
    "return_hidden_states": (_empty, "the answer only"),
    "return_routed_experts": (_empty, "the answer only"),
    "return_cached_tokens_details": (_empty, "the answer only"),
}
"""Field → a test for the values that ask for nothing, and a short text on what is supported. Null asks for nothing."""

NEUTRAL = frozenset({
    "user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls",
    "cache_salt", "session_id", "extra_key", "include_reasoning", "separate_reasoning", "stream_reasoning",
    "guided_decoding_backend", "routed_experts_prompt_start", "mm_payload", "return_mm_kwargs", "truncation_side",
})  # fmt: skip
"""Fields that could not change an answer here: who asks, hints for caches, how to write what there is none of."""
CONSTRAINTS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_json_object",
    "regex", "json_schema",
)  # fmt: skip
"""Fields that :mod:`.constraints` reads."""


def refuse_unsupported(body: Mapping[str, Any], limited: Mapping[str, Rule] = LIMITED) -> None:
    """Refuses a field that is known and has no effect here, if its value asks for one.

    Raises:
        ServeError: unsupported_value.
    """
    for name, value in body.items():
        if value is None or name not in limited:
            continue
        is_supported, supported = limited[name]
        if not is_supported(value):
            why = f"{name}={shown(value, 80)} is not supported ({supported})"
            raise ServeError("unsupported_value", why, param=name)


def note_ignored(body: Mapping[str, Any], works: Iterable[str], ignored: Ignored) -> None:
    """Notes the fields that nothing reads.

    Args:
        body: the request.
        works: the names of the fields that are read.
        ignored: gets the others.
    """
    known = {*works, *CONSTRAINTS, *NEUTRAL, *LIMITED}
    for name, value in body.items():
        if name not in known and value is not None:
            ignored.add(name)
    options = body.get("stream_options")
    if isinstance(options, dict):
        asked = {name: value for name, value in options.items() if value is not False}
        ignored.note(asked, ("include_usage", "continuous_usage_stats"), "stream_options")
