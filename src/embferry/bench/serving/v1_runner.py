"""A plug-in for vLLM, so that its Mooncake connector works on the runner that CPUs have.

That runner (V1) returns from a step without tokens before it asks the connector, so what a consumer was to load in
such a step is never loaded. Here such a step loads, as on the V2 runner.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.execute_model
    if getattr(original, "loads_without_tokens", False):
        return

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens or not has_ec_transfer() or not get_ec_transfer().is_consumer:
            return output
        if not getattr(scheduler_output.ec_connector_metadata, "loads", None):
            return output
        with self.maybe_get_ec_connector_output(scheduler_output, encoder_cache=self.encoder_cache) as loaded:
            pass  # what is to be done happens on entering and on leaving
        return ModelRunnerOutput.with_ec_conn_output_only(loaded)

    execute_model.loads_without_tokens = True  # type: ignore[attr-defined]  # a mark for whoever comes second
    GPUModelRunner.execute_model = execute_model
