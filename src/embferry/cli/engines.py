"""``--engine``: which settings go with which engine, for the commands that have both."""

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
"""Settings by section that vLLM decides itself (its own options), or has nothing for; ``*``: all of it."""
_ONLY_SERVE = frozenset({"encoders", "languages", "transports", "instance_timeout"})
_ONLY_ROUTER = frozenset({"encode_urls", "language_urls", "consumer_zmq"})


def fits_router(settings: Settings, given: frozenset[Key]) -> None:
    """Ends the process with status 2 if an option stands there that has no effect, or one is missing."""
    mine = settings.vllm
    _fits(settings, given, lambda key: key == ("model",) or (key[0] == "vllm" and key[-1] in _ONLY_SERVE))
    if settings.router.engine != "vllm":
        return
    missing = [name for name in ("encode_urls", "language_urls") if not getattr(mine, name)]
    if missing:
        fail(*(f"--engine vllm needs {flag_name((name,))}, such as http://127.0.0.1:8001" for name in missing))
    if mine.connector == "mooncake" and len(mine.consumer_zmq) != len(mine.language_urls):
        fail("--connector mooncake needs --consumer-zmq: the control address of each of --language-urls, in that order")
    if mine.connector != "mooncake" and mine.consumer_zmq:
        fail("--consumer-zmq goes with --connector mooncake")


def fits_serve(settings: Settings, given: frozenset[Key]) -> None:
    """As :func:`fits_router`."""
    _fits(settings, given, lambda key: key[0] == "vllm" and key[-1] in _ONLY_ROUTER)
    if settings.router.engine != "vllm":
        return
    if settings.vllm.connector != "embferry":
        fail("embferry serve starts vLLM with the connector of this project; --connector goes with embferry router")


def _fits(settings: Settings, given: frozenset[Key], idle: Callable[[Key], bool]) -> None:
    """``idle``: settings for vLLM that the command at hand has no use for."""
    if settings.router.engine == "vllm":
        wrong = [key for key in given if _decided_by_vllm(key) or idle(key)]
        why = "has no effect here with --engine vllm; leave it out"
    else:
        wrong = [key for key in given if key[0] == "vllm"]
        why = "goes with --engine vllm"
    if wrong:
        fail(*(f"{_flag(key)} {why}" for key in sorted(wrong)))


def _flag(key: Key) -> str:
    """As it is most likely to have been typed."""
    return flag_name(key[1:] if key[0] in ("router", "vllm") and len(key) > 1 else key)


def _decided_by_vllm(key: Key) -> bool:
    names = _NOT_WITH_VLLM.get(key[0] if len(key) > 1 else "", frozenset())
    return "*" in names or key[-1] in names
