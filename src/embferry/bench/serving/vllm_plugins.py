"""Changes to vLLM for a fair comparison, as plug-ins that vLLM calls in each of its processes."""

from __future__ import annotations

from typing import Any

SPIN_S = 0.003
LOOK_MS = 5
"""How often a sleeping reader looks. vLLM drops a notice that closely follows another; without regular looks, some
requests waited for vLLM's own limit of 5 s."""


def idle_workers() -> None:
    """Makes a process that waits for another one's message sleep after some milliseconds.

    vLLM's engine and worker poll for the next message for a second after each one. With a core for each that costs
    nothing. Five engines on two cores fill both, and other threads wait hundreds of milliseconds for a core.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if getattr(SpinCondition, "sleeps_early", False):
        return
    make, wait = SpinCondition.__init__, SpinCondition.wait

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  (replaces the method of that name)
        make(self, *args, **kwargs)
        if self.is_reader:
            self.busy_loop_s = SPIN_S

    def look(self: Any, timeout_ms: int | None = None) -> None:
        wait(self, LOOK_MS if timeout_ms is None else min(timeout_ms, LOOK_MS))

    SpinCondition.__init__, SpinCondition.wait, SpinCondition.sleeps_early = __init__, look, True


def loads_without_tokens() -> None:
    """Makes vLLM's Mooncake connector work on the runner that CPUs have (V1).

    That runner returns from a step without tokens before it calls the connector, so loads in such a step are lost.
    """
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
            pass  # entering and leaving do the work
        return ModelRunnerOutput.with_ec_conn_output_only(loaded)

    execute_model.loads_without_tokens = True  # type: ignore[attr-defined]  # marks it for the next call
    GPUModelRunner.execute_model = execute_model
