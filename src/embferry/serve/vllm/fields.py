"""The fields of requests that vLLM 0.32 knows. Every field is passed on; the ignored ones are named to the client.

Ignored are fields that vLLM does not know, fields that the router drops, and fields within messages and their parts
that nothing reads. The chat template of a model could read the latter, but none is known to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embferry.serve.openai.fields import LIMITED, NEUTRAL
from embferry.serve.openai.ignored import Ignored

_ALL = frozenset({
    "cache_salt", "ec_transfer_params", "frequency_penalty", "ignore_eos", "include_stop_str_in_output",
    "kv_transfer_params", "logit_bias", "min_p", "mm_payload", "model", "presence_penalty", "priority",
    "repetition_penalty", "request_id", "return_mm_kwargs", "seed", "session_id", "skip_special_tokens", "stop",
    "stop_token_ids", "stream", "structured_outputs", "temperature", "top_k", "top_p", "user", "vllm_xargs",
    "watermarking",
})  # fmt: skip
"""Fields of all paths that generate."""
_CHAT_AND_TEXT = _ALL | {
    "add_special_tokens", "allowed_token_ids", "bad_words", "echo", "length_penalty", "logprob_token_ids", "logprobs",
    "max_tokens", "min_tokens", "n", "prompt_logprobs", "repetition_detection", "response_format", "return_token_ids",
    "return_token_offsets", "return_tokens_as_token_ids", "routed_experts_prompt_start",
    "spaces_between_special_tokens", "stream_interval", "stream_options", "thinking_token_budget",
    "truncate_prompt_tokens", "truncation_side", "use_beam_search",
}  # fmt: skip
CHAT_FIELDS = _CHAT_AND_TEXT | {
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents",
    "include_reasoning", "max_completion_tokens", "media_io_kwargs", "messages", "mm_processor_kwargs",
    "parallel_tool_calls", "reasoning_effort", "return_prompt_text", "tool_choice", "tools", "top_logprobs",
}  # fmt: skip
"""The fields of vLLM's ``ChatCompletionRequest``; then those of its other requests."""
TEXT_FIELDS = _CHAT_AND_TEXT | {"prompt", "prompt_embeds", "suffix"}
RESPONSES_FIELDS = _ALL | {
    "background", "chat_template_kwargs", "enable_response_messages", "include", "include_reasoning", "input",
    "instructions", "max_output_tokens", "max_tool_calls", "media_io_kwargs", "metadata", "mm_processor_kwargs",
    "parallel_tool_calls", "previous_input_messages", "previous_response_id", "prompt", "prompt_cache_key", "reasoning",
    "service_tier", "store", "text", "tool_choice", "tools", "top_logprobs", "truncation",
}  # fmt: skip
TOKENIZE_FIELDS = frozenset({"add_special_tokens", "model", "prompt", "return_token_strs"})
TOKENIZE_CHAT_FIELDS = frozenset({
    "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs", "continue_final_message",
    "media_io_kwargs", "messages", "mm_processor_kwargs", "model", "return_token_strs", "tools",
})  # fmt: skip
DETOKENIZE_FIELDS = frozenset({"model", "tokens"})
STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})

_BY_PATH: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": CHAT_FIELDS,
    "/v1/completions": TEXT_FIELDS,
    "/v1/responses": RESPONSES_FIELDS,
    "/detokenize": DETOKENIZE_FIELDS,
}
_WITH_EFFECT = frozenset({"role", "content", "name", "task"})
_OF_ROLE: Mapping[str, frozenset[str]] = {
    "assistant": frozenset({"tool_calls", "reasoning", "reasoning_content"}),
    "tool": frozenset({"tool_call_id"}),
    "developer": frozenset({"tools"}),
}
"""Fields of a message that vLLM reads, of any and of one role."""
_MESSAGES: Mapping[str, frozenset[str]] = {
    "messages": _WITH_EFFECT,
    "input": _WITH_EFFECT | {"type", "id", "status", "phase"},  # of a response; an item says what it is
}
"""The field with the messages of a request → the fields of each that are read, of any role."""
_OF_PART: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("text", "input_text"), frozenset({"text"})),
    "output_text": frozenset({"text", "annotations", "logprobs"}),  # as the API itself gives it
    **{name: frozenset({name}) for name in ("refusal", "image_url", "video_url", "audio_url", "input_audio")},
    "input_image": frozenset({"image_url"}),
    **{name: frozenset({name}) for name in ("image", "video")},
    "thinking": frozenset({"thinking", "closed"}),
    "tool_reference": frozenset({"name"}),
}
"""Type of a part → its fields, beside ``type``. Of other types, vLLM refuses the part."""
_NAMED = frozenset({"image_url", "input_image", "image", "video_url", "video", "audio_url", "input_audio"})
"""Types of parts with a file that later requests may name by its ``uuid``."""
_UNTYPED = ("image_url", "video_url", "image", "video", "audio_url", "input_audio", "text")
"""The fields by which a part without a type is known; the first that it has."""
_OF_URL = frozenset({"url"})
_OF_SOUND = frozenset({"data", "format"})


def ignored_fields(
    request: dict[str, Any], path: str = "/v1/chat/completions", *, keeps_names: bool = False
) -> Ignored:
    """Returns the fields of a request that have no effect. A field that asks for nothing is left out.

    Args:
        request: the request.
        path: where it was sent.
        keeps_names: whether the ``uuid`` of a file has an effect.
    """
    ignored = Ignored()
    known = _BY_PATH.get(path) or (TOKENIZE_CHAT_FIELDS if "messages" in request else TOKENIZE_FIELDS)
    for name, value in request.items():
        if name in known or name in NEUTRAL or value is None:
            continue
        if name not in LIMITED or not LIMITED[name][0](value):
            ignored.add(name)
    options = request.get("stream_options")
    if isinstance(options, dict):
        ignored.note(options, STREAM_OPTIONS | {"include_obfuscation"}, "stream_options")
    for field, read in _MESSAGES.items():
        messages = request.get(field)
        for number, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict) and (field != "input" or "role" in message):
                _note_message(message, f"{field}[{number}]", read, ignored, keeps_names)
    return ignored


def _note_message(message: dict[str, Any], at: str, read: frozenset[str], ignored: Ignored, keeps_names: bool) -> None:
    role = message.get("role")
    of_role = _OF_ROLE.get(role, frozenset()) if isinstance(role, str) else frozenset()
    ignored.note(message, read | of_role, at)
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict):
            _note_part(part, f"{at}.content[{number}]", ignored, keeps_names)


def _note_part(part: dict[str, Any], at: str, ignored: Ignored, keeps_names: bool) -> None:
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in _UNTYPED if part.get(name) is not None), None)
    known = _OF_PART.get(kind) if isinstance(kind, str) else None
    if known is None:
        return
    ignored.note(part, known | ({"type", "uuid"} if keeps_names and kind in _NAMED else {"type"}), at)
    for name in known:
        if isinstance(source := part.get(name), dict):
            ignored.note(source, _OF_SOUND if name == "input_audio" else _OF_URL, f"{at}.{name}")
