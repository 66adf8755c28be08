"""The name of each setting in the file, in the environment and on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic.fields import FieldInfo

from embferry.serve.config import SECTIONS, Settings

ENV_PREFIX = "EMBFERRY_"
CONFIG_ENV = "EMBFERRY_CONFIG"

Key = tuple[str, ...]
"""``("transfer", "num_blocks")``, or ``("model",)`` for a setting of every process."""

FIELDS: dict[Key, FieldInfo] = {
    (name,): field for name, field in Settings.model_fields.items() if name not in SECTIONS
} | {(section, name): field for section, model in SECTIONS.items() for name, field in model.model_fields.items()}

SGLANG_ALIASES: dict[str, Key | None] = {
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": ("transfer", "num_blocks"),
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": ("transfer", "block_size"),
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": ("transfer", "default_allocate_tokens"),
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": ("transfer", "bootstrap_timeout"),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": ("transfer", "waiting_timeout"),
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": ("transfer", "heartbeat_interval"),
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": ("transfer", "heartbeat_max_failures"),
    # One thread drives all transfers, so there is no pool and no queue to size.
    "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE": None,
    "SGLANG_DISAGGREGATION_QUEUE_SIZE": None,
}
"""The setting of each variable that users of SGLang have set; None for a variable without a counterpart."""


def dotted(key: Key) -> str:
    return ".".join(key)


def env_name(key: Key) -> str:
    return ENV_PREFIX + "_".join(key).upper()


def flag_name(key: Key) -> str:
    return "--" + "-".join(key).replace("_", "-")


ENV_KEYS: dict[str, Key] = {env_name(key): key for key in FIELDS}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence that suggests the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
