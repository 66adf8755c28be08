"""How many workers there are: as many as their work asks for, between the bounds of the settings."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from embferry.deploy.ray.names import WORK

METRICS_SECONDS = 1.0
LOOK_BACK_SECONDS = 3.0
"""The time over which the work of a worker is averaged."""


def by_work(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Returns the number of workers that the work asks for. Ray Serve rounds it up, bounds it and applies the delays.

    Runs in Serve's controller. Serve's own policy counts calls through its handles, and routers call workers directly.
    """
    told = (context.aggregated_metrics or {}).get(WORK)
    if not told:  # no worker has told yet, such as after a restart of the controller
        return context.target_num_replicas, {}
    return sum(told.values()) / context.config.target_ongoing_requests, {}


def autoscaling(least: int, most: int, work: float, upscale_delay: float, downscale_delay: float) -> AutoscalingConfig:
    """Returns the configuration of a deployment's autoscaling.

    Args:
        least: workers that there are always.
        most: workers that there may be.
        work: requests for each worker.
        upscale_delay: seconds of too much work before a worker is started.
        downscale_delay: seconds of too little work before one is taken away.
    """
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=work,
        upscale_delay_s=upscale_delay,
        downscale_delay_s=downscale_delay,
        metrics_interval_s=METRICS_SECONDS,
        look_back_period_s=LOOK_BACK_SECONDS,
        policy=AutoscalingPolicy(policy_function=by_work),
    )
