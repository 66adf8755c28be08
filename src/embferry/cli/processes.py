"""The commands that start processes: ``serve``, ``router``, ``encode``, ``language`` and ``bootstrap``.

They import heavy modules only once they know that the settings and the model are valid.
"""

from __future__ import annotations

import logging
from pathlib import Path

from embferry.cli.engines import check_arguments, check_router, check_serve, with_arguments
from embferry.cli.options import fail, need, settings_command
from embferry.models import model_path, packaged_models
from embferry.models.checkpoints import check_directory
from embferry.models.hub import cached, download, is_hub_name
from embferry.serve.config import SECTIONS, Settings
from embferry.serve.security import check_bootstrap, check_part, check_worker
from embferry.serve.security import check_router as check_router_host

log = logging.getLogger(__name__)


@settings_command("serve", "router", "vllm", "ray", also=tuple(SECTIONS), check=check_serve, rest="VLLM_ARGUMENTS")
def serve(settings: Settings, rest: list[str]) -> None:
    """Start everything on this machine.

    Bootstrap server, encode and language workers and the router, as processes that are started again when they die.
    With --engine vllm: instances of vLLM and the router; the arguments after -- go to each vllm serve.
    With --on ray: on a Ray cluster, where Ray Serve starts, scales and restarts them.
    """
    check_arguments(settings, rest)
    check_router_host(settings)
    if settings.serve.runs_on == "ray":
        need("ray", "ray")
        from embferry.deploy.ray.command import run as run_on_ray

        if settings.router.engine != "vllm" and settings.ray.address is None:
            _check_model(settings)
        run_on_ray(with_arguments(settings, rest))
        return
    if settings.router.engine == "vllm":
        from embferry.serve.supervisor.vllm import run as run_vllm

        run_vllm(settings, rest)
        return
    _check_model(settings)
    from embferry.serve.supervisor import run

    run(settings)


@settings_command("router", "vllm", also=("media", "traces"), check=check_router)
def router(settings: Settings) -> None:
    """Start the router: the OpenAI-compatible HTTP API.

    It stands before workers of this project or, with --engine vllm, before instances of vLLM that run its
    encode/prefill/decode split: see --encode-urls and the options after it.
    """
    from embferry.serve.router.process import run

    if settings.router.engine != "vllm":
        check_bootstrap(settings)
    run(settings)


@settings_command("encode", also=("transfer", "media", "bootstrap", "cache", "traces"))
def encode(settings: Settings) -> None:
    """Start an encode worker: pictures and videos in, embeddings out.

    With --wire origin it takes the place of SGLang's, behind its load balancer.
    """
    _begin_worker(settings)
    if settings.wire == "origin":
        _check_origin(settings)
        from embferry.serve.origin.encode import run
    else:
        from embferry.serve.encode.process import run

    run(settings)


@settings_command("language", also=("transfer", "bootstrap", "traces"))
def language(settings: Settings) -> None:
    """Start a language worker: embeddings in, answers out.

    With --wire origin it takes the place of SGLang's, behind its load balancer.
    """
    _begin_worker(settings)
    if settings.wire == "origin":
        _check_origin(settings)
        from embferry.serve.origin.language import run
    else:
        from embferry.serve.language.process import run

    run(settings)


@settings_command("bootstrap")
def bootstrap(settings: Settings) -> None:
    """Start the bootstrap server. Workers register there, and routers find them."""
    from embferry.serve.bootstrap import run

    run(settings)


def _begin_worker(settings: Settings) -> None:
    """Checks what can be checked without torch, whose import takes seconds."""
    if settings.wire == "origin":
        check_part(settings, "the worker")
    else:
        check_worker(settings)
    _check_model(settings)
    log.info("loading torch and transformers")


def _check_origin(settings: Settings) -> None:
    """Ends the process with status 2 if the settings or the installed packages are not those of the origin's wire."""
    from embferry.serve.origin.process import check_origin

    check_origin(settings)
    need("mooncake", "zmq", "mooncake")


def _check_model(settings: Settings) -> None:
    """Downloads the model if it is on the hub. Ends the process with status 2 if it cannot be run."""
    need("serve", "torch")
    try:
        check_directory(_directory(settings.model))
    except ValueError as error:
        fail(f"{settings.place('model')}: {error}")


def _directory(name: str) -> Path:
    """Returns the directory of a model, which is downloaded if it has the name of one and is not here yet.

    Raises:
        ValueError: there is none.
    """
    is_local = name in packaged_models() or (Path(name).expanduser() / "config.json").is_file()
    if is_local or not is_hub_name(name):
        return model_path(name)
    found = cached(name)
    try:
        if found is not None:
            check_directory(found)
            return found
    except ValueError:
        log.info("%s in the local cache is incomplete", name)
    return download(name, log.info)
