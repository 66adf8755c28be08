"""The application: which deployments Ray Serve runs, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from embferry.deploy.ray.names import ROUTER, WorkerRole
from embferry.deploy.ray.router_replica import ingress
from embferry.deploy.ray.scaling import autoscaling
from embferry.deploy.ray.vllm_instance import VllmReplica
from embferry.deploy.ray.worker import WorkerReplica
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError, of_mapping
from embferry.serve.supervisor.vllm_arguments import secrets

HEALTH_SECONDS, HEALTH_TIMEOUT = 5.0, 30.0
"""Between two checks of a replica, and for one. Ray replaces a replica that has failed three in a row."""
SPARE_SECONDS = 5.0
"""Seconds beyond those for its work and for its process after which a replica that is taken away is killed."""
TOLD_SECONDS = 1.0
"""Between two times at which routers are told the load of a worker."""
WAIT_LOOP_SECONDS = 0.5
"""Seconds after which a replica that is taken away begins to end: routers have been told by then."""
LOGGING = LoggingConfig(enable_access_log=False)
"""The router has a line for each request already."""
MANY_REQUESTS = 100_000
"""Requests that Serve lets a router have. The router itself bounds them, with errors that say so."""


def app(args: Mapping[str, Any]) -> serve.Application:
    """Returns the application, for ``import_path`` of a ``serve`` config file.

    Args:
        args: those of the file: the settings, as in a settings file.

    Raises:
        ConfigError: there are no such settings, or they cannot be used on Ray.
    """
    return application(of_mapping(args, "args"))


def application(settings: Settings, *, needs_key: bool = False) -> serve.Application:
    """Returns the application. ``needs_key``: no router may run without an API key in its environment.

    Raises:
        ConfigError: the settings cannot be used on Ray.
    """
    if problems := unusable(settings):
        raise ConfigError(problems)
    ray = settings.ray
    encode = worker("encode", settings, ray.encoder_cpus, ray.encoder_gpus, ray.encoder_resources)
    language = worker("language", settings, ray.language_cpus, ray.language_gpus, ray.language_resources)
    router = serve.deployment(
        ingress(),
        name=ROUTER,
        num_replicas=ray.routers,
        max_ongoing_requests=MANY_REQUESTS,
        graceful_shutdown_timeout_s=ray.drain_timeout,
        graceful_shutdown_wait_loop_s=WAIT_LOOP_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT,
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": ray.router_cpus, "resources": ray.router_resources},
    )
    return router.bind(settings, needs_key, encode, language)


def worker(
    role: WorkerRole, settings: Settings, cpus: float, gpus: float, resources: dict[str, float]
) -> serve.Application:
    """Returns the deployment of the workers of a role, with its arguments."""
    ray = settings.ray
    bounds = (
        (ray.min_encoders, ray.max_encoders, ray.work_per_encoder)
        if role == "encode"
        else (ray.min_languages, ray.max_languages, ray.work_per_language)
    )
    deployment: Any = serve.deployment(
        VllmReplica if settings.router.engine == "vllm" else WorkerReplica,
        name=role,
        autoscaling_config=autoscaling(*bounds, ray.upscale_delay, ray.downscale_delay),
        request_router_config=RequestRouterConfig(
            request_router_class="embferry.deploy.ray.told_replicas:ToldReplicas",
            request_router_kwargs={"role": role},
            request_routing_stats_period_s=TOLD_SECONDS,
        ),
        graceful_shutdown_timeout_s=worker_seconds(settings),
        graceful_shutdown_wait_loop_s=WAIT_LOOP_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT,
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "resources": resources},
    )
    return deployment.bind(role, settings)


def worker_seconds(settings: Settings) -> float:
    """Returns the seconds that a worker has to end, after which it is killed."""
    return settings.ray.drain_timeout + settings.serve.stop_timeout + SPARE_SECONDS


def unusable(settings: Settings) -> list[str]:
    """Returns one sentence for each setting that cannot be used on Ray."""
    problems = []
    if settings.router.api_key is not None:
        why = "Ray's dashboard would show it; set EMBFERRY_ROUTER_API_KEY in the environment of the nodes"
        problems.append(f"{settings.place('router', 'api_key')}: {why}, or use router.api_keys_file")
    for option, variable in secrets(settings.ray.vllm_arguments):
        why = f"Ray's dashboard would show it; set {variable} in the environment of the nodes"
        problems.append(f"{settings.place('ray', 'vllm_arguments')}: {option}: {why}")
    if settings.wire == "origin":
        problems.append(f"{settings.place('wire')}: workers behind SGLang's load balancer do not run on Ray")
    if settings.router.engine == "vllm":
        if settings.ray.routers > 1:  # an instance reports to the router that has asked it, and knows one address
            problems.append(f"{settings.place('ray', 'routers')}: with vLLM, there is one router on Ray")
        if settings.vllm.prefills or settings.vllm.decodes:
            named = settings.place("vllm", "prefills" if settings.vllm.prefills else "decodes")
            problems.append(f"{named}: prefill and decode instances do not run on Ray; leave it out")
        if settings.vllm.connector != "embferry":
            problems.append(
                f"{settings.place('vllm', 'connector')}: instances on Ray have the connector of this project"
            )
    return problems
