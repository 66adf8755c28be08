"""Table of the functions and classes that the plug-in replaces in an encoder."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from . import encoder, encoder_http, videos  # noqa: F401 - encoder_http: the paths of the encoder's HTTP server
from .hooks import Hook

SERVER, RUNTIME = "disaggregation.encoder.server", "disaggregation.encoder.runtime"
PREPROCESSOR = "disaggregation.encoder.preprocessor"

HOOKS = [
    Hook(SERVER, "ZmqDelivery", HookType.REPLACE, encoder.EmbferryDelivery, "encoder, cleanup_receive_state"),
    Hook(
        SERVER,
        "MMEncoder.__init__",
        HookType.AROUND,
        encoder.constructed,
        "self, server_args, schedule_path, dist_init_method, rank, gpu_id",
    ),
    Hook(SERVER, "MMEncoder._infer_embedding_dims", HookType.AROUND, encoder.embedding_dims, "self"),
    Hook(SERVER, "MMEncoder._publish_preprocess_metadata", HookType.AROUND, encoder.publish, "self, ctx, requests"),
    Hook(RUNTIME, "execute_encode_pipeline", HookType.AROUND, encoder.pipeline, "enc, sched, request, send_sockets"),
    Hook(RUNTIME, "EncoderScheduler.submit", HookType.AROUND, encoder.submit, "self, request"),
    Hook(RUNTIME, "EncoderScheduler._collect_batch", HookType.AROUND, encoder.collect_batch, "self"),
    Hook(
        PREPROCESSOR,
        "EncoderPreprocessor._process_video_items",
        HookType.AROUND,
        videos.process_video_items,
        "self, mm_items, model_preprocessor",
    ),
    Hook(RUNTIME, "launch_dp_runtime", HookType.AROUND, encoder.refuse_data_parallelism, "server_args"),
]
