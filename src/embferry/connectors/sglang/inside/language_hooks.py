"""Table of the functions and classes that the plug-in replaces in a language server."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from . import language, waiting
from .hooks import Hook

RECEIVER, TOKENIZER = "disaggregation.encoder.receiver", "managers.tokenizer_manager"

HOOKS = [
    Hook(
        RECEIVER,
        "WaitingZmqRequest",
        HookType.REPLACE,
        waiting.EmbferryWaiting,
        "rid, recv_req, mm_processor, encoder_urls, model_type, host_name, receive_count, embedding_pool, zmq_context, "
        "embedding_port, registration_runner",
    ),
    Hook(
        RECEIVER,
        "MMReceiverBase.__init__",
        HookType.AROUND,
        language.constructed,
        "self, server_args, dtype, hf_config, scheduler, encode_urls",
    ),
    Hook(
        RECEIVER,
        "MMReceiverBase._run_encode_in_thread",
        HookType.AROUND,
        language.run_encode_in_thread,
        "self, req_id, mm_data, endpoint_encode, num_items_assigned, encode_urls, time_stats_json, "
        "scheduler_dispatch_ready, on_dispatch_error",
    ),
    Hook(RECEIVER, "MMReceiverBase._drain_scheduler_embeddings", HookType.AROUND, waiting.share, "self"),
    Hook(RECEIVER, "MMReceiverBase.create_req", HookType.BEFORE, language.has_input_ids, "self, recv_req"),
    Hook(
        RECEIVER,
        "MMReceiverBase.abort_waiting_requests",
        HookType.AROUND,
        language.abort_waiting_requests,
        "self, recv_req",
    ),
    Hook(RECEIVER, "EncoderBootstrapServer._probe", HookType.AROUND, language.probe, "self, session, url"),
    Hook(TOKENIZER, "TokenizerManager.abort_request", HookType.AROUND, language.abort_request, "self, rid, abort_all"),
    Hook(
        TOKENIZER,
        "TokenizerManager._forward_encoder_dispatch_error",
        HookType.AROUND,
        language.forward_dispatch_error,
        "self, error",
    ),
    Hook(
        TOKENIZER,
        "TokenizerManager._handle_epd_disaggregation_encode_request",
        HookType.AROUND,
        language.handle_encode_request,
        "self, obj",
    ),
]
