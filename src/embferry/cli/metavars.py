"""The kind and the unit of an option's value, as the help shows them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Le

from embferry.serve.config import MIB
from embferry.serve.config_load import FIELDS, Key

MAX_SECONDS = 86_400
"""The bound of every setting in seconds."""
_BY_KEY = {
    "model": "NAME|FOLDER",
    "threads": "THREADS",
    "transfer.http_advertise": "ADDRESS|URL",
    "transfer.http_proxy": "URL",
    "transfer.mooncake_device": "NAME,...",
    "transfer.mooncake_metadata_server": "P2PHANDSHAKE|URL",
    "transfer.num_blocks": "BLOCKS",
    "transfer.block_size": "TOKENS",
    "media.allowed_hosts": "HOST,...",
    "router.cors_origins": "ORIGIN,...",
    "media.max_images": "PICTURES",
    "media.max_videos": "VIDEOS",
    "media.max_side": "PIXELS",
    "media.max_aspect_ratio": "RATIO",
    "media.video_fps": "FRAMES_PER_SECOND",
    "media.decode_memory": "BYTES",
    "router.body_least_rate": "BYTES_PER_SECOND",
    "encode.max_rooms": "REQUESTS",
    "language.max_concurrent": "REQUESTS",
    "language.max_queued": "REQUESTS",
    "serve.encode_workers": "WORKERS",
    "serve.language_workers": "WORKERS",
    "vllm.consumer_zmq": "ADDRESS,...",
    "vllm.encoders": "INSTANCES",
    "vllm.languages": "INSTANCES",
    "vllm.prefills": "INSTANCES",
    "vllm.decodes": "INSTANCES",
    "vllm.affinity_slack": "ITEMS",
    "ray.address": "auto|HOST:PORT",
    "ray.routers": "ROUTERS",
    "ray.min_encoders": "WORKERS",
    "ray.max_encoders": "WORKERS",
    "ray.work_per_encoder": "REQUESTS",
    "ray.min_languages": "WORKERS",
    "ray.max_languages": "WORKERS",
    "ray.work_per_language": "REQUESTS",
    "ray.router_resources": "NAME:AMOUNT,...",
    "ray.encoder_resources": "NAME:AMOUNT,...",
    "ray.language_resources": "NAME:AMOUNT,...",
    "ray.vllm_arguments": "WORDS",
}
"""The kind of a value where neither the type nor the name of its setting tells it."""
_BY_ENDING = {
    "bytes_per_second": "BYTES_PER_SECOND",
    "requests_per_second": "REQUESTS_PER_SECOND",
    "bytes": "BYTES",
    "bytes_per_client": "BYTES",
    "bytes_per_peer": "BYTES",
    "tokens": "TOKENS",
    "characters": "CHARACTERS",
    "pixels": "PIXELS",
    "frames": "FRAMES",
    "connections": "CONNECTIONS",
    "connections_per_address": "CONNECTIONS",
    "requests": "REQUESTS",
    "port": "PORT",
    "host": "HOST",
    "url": "URL",
    "endpoint": "URL",
    "urls": "URL,...",
    "folders": "FOLDER,...",
    "name": "NAME",
    "transports": "NAME,...",
    "backends": "NAME,...",
    "protocol": "NAME",
}
"""The kind of a value by the end of the setting's name, the longest first."""


def metavar(key: Key) -> str | None:
    """Returns the kind of an option's value, in capitals, or its choices; None for a switch."""
    kind = _plain(FIELDS[key].annotation)
    if kind is bool:
        return None
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    name, ending = ".".join(key), key[-1]
    if name in _BY_KEY:
        return _BY_KEY[name]
    known = next((text for end, text in _BY_ENDING.items() if ending == end or ending.endswith(f"_{end}")), None)
    if known is not None:
        return known
    if is_seconds(key):
        return "SECONDS"
    return "FILE" if kind is Path else "NUMBER" if kind in (int, float) else "TEXT"


def is_seconds(key: Key) -> bool:
    """Returns whether the value of a setting is a time in seconds."""
    return any(isinstance(bound, Le) and bound.le == MAX_SECONDS for bound in FIELDS[key].metadata)


def with_unit(key: Key, default: str) -> str:
    """Returns a default with its unit, where a bare number is hard to read."""
    if metavar(key) == "BYTES" and default.isdigit() and int(default) >= MIB and int(default) % MIB == 0:
        return f"{default}, {int(default) // MIB} MiB"
    if metavar(key) is None:
        return "on" if default == "True" else "off"
    return f"{default} s" if is_seconds(key) else default


def _plain(annotation: Any) -> Any:
    """Returns the type of a value without its bounds and without None."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
