"""``--engine``: checks that the options given belong to the engine chosen."""

from __future__ import annotations

from collections.abc import Callable

from embferry.cli.options import fail
from embferry.serve.config import Settings
from embferry.serve.config_load import Key, flag_name

_NOT_WITH_VLLM: dict[str, frozenset[str]] = {
    "": frozenset({"dtype", "threads", "bootstrap_url"}),
    "transfer": frozenset({"*"}),
    "encode": frozenset({"*"}),
    "language": frozenset({"*"}),
    "bootstrap": frozenset({"*"}),
    "router": frozenset({"served_model_name", "default_max_tokens"}),
    "media": frozenset(
        {
            *("max_pixels", "max_side", "max_aspect_ratio"),
            *("video_fps", "max_video_frames", "max_video_pixels", "max_video_seconds"),
        }
    ),
    "serve": frozenset({"encode_workers", "language_workers", "start_timeout"}),
}
"""Settings by section that have no effect with vLLM, which has options of its own; ``*``: the whole section."""
_ONLY_SERVE = frozenset({"encoders", "languages", "transports", "instance_timeout"})
_ONLY_ROUTER = frozenset({"encode_urls", "language_urls", "consumer_zmq"})


def check_router(settings: Settings, given: frozenset[Key]) -> None:
    """Ends the process with status 2 if an option has no effect or is missing."""
    vllm = settings.vllm
    _check(settings, given, lambda key: key == ("model",) or (key[0] == "vllm" and key[-1] in _ONLY_SERVE))
    if settings.router.engine != "vllm":
        return
    missing = [name for name in ("encode_urls", "language_urls") if not getattr(vllm, name)]
    if missing:
        fail(*(f"--engine vllm needs {flag_name((name,))}, such as http://127.0.0.1:8001" for name in missing))
    if vllm.connector == "mooncake" and len(vllm.consumer_zmq) != len(vllm.language_urls):
        fail("--connector mooncake needs --consumer-zmq: the control address of each of --language-urls, in that order")
    if vllm.connector != "mooncake" and vllm.consumer_zmq:
        fail("--consumer-zmq needs --connector mooncake")


def check_serve(settings: Settings, given: frozenset[Key]) -> None:
    """Does the same as :func:`check_router` for ``embferry serve``."""
    _check(settings, given, lambda key: key[0] == "vllm" and key[-1] in _ONLY_ROUTER)
    if settings.router.engine != "vllm":
        return
    if settings.vllm.connector != "embferry":
        fail("embferry serve starts vLLM with the connector of this project; --connector needs embferry router")


def _check(settings: Settings, given: frozenset[Key], is_idle: Callable[[Key], bool]) -> None:
    """Refuses options of the other engine, and those for which ``is_idle`` says that this command does not use them."""
    if settings.router.engine == "vllm":
        wrong = [key for key in given if _decided_by_vllm(key) or is_idle(key)]
        why = "has no effect here with --engine vllm; leave it out"
    else:
        wrong = [key for key in given if key[0] == "vllm"]
        why = "needs --engine vllm"
    if wrong:
        fail(*(f"{_flag(key)} {why}" for key in sorted(wrong)))


def _flag(key: Key) -> str:
    """Returns the shortest spelling, which the user has most likely typed."""
    return flag_name(key[1:] if key[0] in ("router", "vllm") and len(key) > 1 else key)


def _decided_by_vllm(key: Key) -> bool:
    names = _NOT_WITH_VLLM.get(key[0] if len(key) > 1 else "", frozenset())
    return "*" in names or key[-1] in names
