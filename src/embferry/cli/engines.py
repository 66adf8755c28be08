"""``--engine``: checks that the options given belong to the engine chosen."""

from __future__ import annotations

from collections.abc import Sequence, Set

from embferry.cli.options import fail
from embferry.serve.config import Settings
from embferry.serve.config_load import Key, dotted, flag_name

_NOT_WITH_VLLM = frozenset({
    "dtype", "threads", "bootstrap_url", "transfer", "encode", "language", "bootstrap",
    "router.served_model_name", "router.default_max_tokens",
    "media.max_pixels", "media.max_side", "media.max_aspect_ratio",
    "media.video_fps", "media.max_video_frames", "media.max_video_pixels", "media.max_video_seconds",
    "serve.encode_workers", "serve.language_workers", "serve.start_timeout",
})  # fmt: skip
"""Settings and whole sections that have no effect with vLLM, which has options of its own."""
_OF_VLLM = {"dtype": "--dtype", "router.served_model_name": "--served-model-name"}
"""Settings among them that are options of ``vllm serve`` too."""
_ALSO_WITH_VLLM = frozenset({"language.max_prompt_characters"})
"""Settings of those sections that the router checks with vLLM too."""
_ONLY_SERVE = frozenset({
    "vllm.encoders", "vllm.languages", "vllm.prefills", "vllm.decodes", "vllm.transports", "vllm.instance_timeout",
})  # fmt: skip
_ONLY_ROUTER = frozenset({
    "vllm.encode_urls", "vllm.language_urls", "vllm.prefill_urls", "vllm.decode_urls", "vllm.consumer_zmq",
    "vllm.connector_metrics_urls",
})  # fmt: skip
_NOT_ON_RAY = frozenset({
    "advertise_host", "bootstrap_url", "bootstrap.port", "serve.encode_workers", "serve.language_workers",
    "serve.restart_delay", "vllm.encoders", "vllm.languages",
})  # fmt: skip
"""Settings in whose place Ray Serve has its own, or the section ``ray``."""


def check_router(settings: Settings, given: Set[Key]) -> None:
    """Ends the process with status 2 if an option has no effect or is missing."""
    vllm = settings.vllm
    _check(settings, given, _ONLY_SERVE | {"model"})
    if settings.router.engine != "vllm":
        return
    stages = [name for name in ("prefill_urls", "decode_urls") if getattr(vllm, name)]
    if stages and vllm.language_urls:
        both = f"{settings.place('vllm', 'language_urls')} and {settings.place('vllm', stages[0])}"
        fail(f"{both}: give the URLs of language instances, or those of prefill and decode instances")
    needed = ("encode_urls", *(("prefill_urls", "decode_urls") if stages else ("language_urls",)))
    missing = [name for name in needed if not getattr(vllm, name)]
    if missing:
        engine = settings.place("router", "engine")
        fail(*(f"{engine} vllm needs {flag_name((name,))}, such as http://127.0.0.1:8001" for name in missing))
    if stages and vllm.connector != "embferry":
        named = settings.place("vllm", "connector")
        fail(f"{named} {vllm.connector} needs --language-urls: only the connector of this project has decode instances")
    if vllm.connector == "mooncake" and len(vllm.consumer_zmq) != len(vllm.language_urls):
        named = settings.place("vllm", "connector")
        fail(f"{named} mooncake needs --consumer-zmq: the control address of each of --language-urls, in that order")
    if vllm.connector != "mooncake" and vllm.consumer_zmq:
        fail(f"{settings.place('vllm', 'consumer_zmq')} needs --connector mooncake")
    _check_metrics(settings)


def _check_metrics(settings: Settings) -> None:
    """Ends the process with status 2 if it is not clear which instance each URL of metrics belongs to."""
    vllm, named = settings.vllm, settings.place("vllm", "connector_metrics_urls")
    given = len(vllm.connector_metrics_urls)
    if given and vllm.connector != "embferry":
        fail(f"{named} needs --connector embferry: the metrics of the others are at the instances themselves")
    roles = ("encode_urls", "prefill_urls" if vllm.prefill_urls else "language_urls", "decode_urls")
    instances = sum(len(getattr(vllm, role)) for role in roles)
    if given and given != instances:
        flags = ", ".join(flag_name((role,)) for role in roles if getattr(vllm, role))
        fail(f"{named} has {given}: give one for each of the {instances} instances, in the order of {flags}")


def check_serve(settings: Settings, given: Set[Key]) -> None:
    """Does the same as :func:`check_router` for ``embferry serve``."""
    is_on_ray = settings.serve.runs_on == "ray"
    wrong = [key for key in given if (dotted(key) in _NOT_ON_RAY if is_on_ray else key[0] == "ray")]
    if wrong:
        why = "has no effect with --on ray; leave it out" if is_on_ray else "needs --on ray"
        fail(*(f"{settings.place(*key)} {why}" for key in sorted(wrong)))
    _check(settings, given, _ONLY_ROUTER, has_rest=True)
    if settings.router.engine == "vllm" and settings.vllm.connector != "embferry":
        named = settings.place("vllm", "connector")
        fail(f"embferry serve starts vLLM with the connector of this project; {named} needs embferry router")
    if bool(settings.vllm.prefills) != bool(settings.vllm.decodes):
        given_one, other = ("prefills", "decodes") if settings.vllm.prefills else ("decodes", "prefills")
        fail(f"{settings.place('vllm', given_one)} needs {flag_name((other,))}: the other half of each answer")
    if settings.vllm.prefills and ("vllm", "languages") in given:
        both = f"{settings.place('vllm', 'languages')} and {settings.place('vllm', 'prefills')}"
        fail(f"{both}: start language instances, or prefill and decode instances")


def check_arguments(settings: Settings, extra: Sequence[str]) -> None:
    """Ends the process with status 2 if the arguments for ``vllm serve`` cannot be right."""
    from embferry.serve.supervisor.vllm_arguments import installed, options, parser_refusal, positional, problems

    if settings.router.engine == "vllm":
        wrong = problems(extra, installed(), parser_refusal)
        if settings.vllm.prefills and "kv-transfer-config" in (name for _, name in options(extra)):
            wrong.append("--kv-transfer-config: embferry serve writes it for prefill and decode instances")
        if wrong:
            fail(*wrong)
    elif extra:
        need = f"arguments for vllm serve need --engine vllm: {' '.join(extra)}"
        fail(need if extra[0].startswith("-") else positional(extra[0]))


def with_arguments(settings: Settings, extra: Sequence[str]) -> Settings:
    """Returns the settings with the arguments for ``vllm serve`` after ``--`` behind those of the settings."""
    words = (*settings.ray.vllm_arguments, *extra)
    return settings.model_copy(update={"ray": settings.ray.model_copy(update={"vllm_arguments": words})})


def _check(settings: Settings, given: Set[Key], idle: Set[str], has_rest: bool = False) -> None:
    """Refuses options of the other engine, and those that this command does not use with vLLM.

    Args:
        settings: of the command.
        given: the keys on its command line.
        idle: further settings and sections without effect.
        has_rest: the command takes options of ``vllm serve`` after ``--``.
    """
    if settings.wire == "origin":
        named = settings.place("wire")
        fail(f"{named} origin is for embferry encode and embferry language, which SGLang's load balancer calls")
    if settings.router.engine == "vllm":
        used = [key for key in given if dotted(key) not in _ALSO_WITH_VLLM]
        wrong = [key for key in used if {key[0], dotted(key)} & (_NOT_WITH_VLLM | idle)]
        why = "has no effect here with --engine vllm; leave it out"
    else:
        wrong = [key for key in given if key[0] == "vllm"]
        why = "needs --engine vllm"
    if wrong:
        known = _OF_VLLM if has_rest else {}
        moved = {
            key: f", or give it to vllm serve, after --: -- {known[dotted(key)]}"
            for key in wrong
            if dotted(key) in known
        }
        fail(*(f"{settings.place(*key)} {why}{moved.get(key, '')}" for key in sorted(wrong)))
