"""From the settings of a process to the parts of a transfer: numbers and layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embferry.engine.embedding import FieldSpec
from embferry.protocol.layout import Field, Layout
from embferry.protocol.settings import TransferSettings
from embferry.serve.config import Settings

FIRST_RETRY_SECONDS = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The setting ``dtype``."""


def language_timeouts(settings: Settings) -> TransferSettings:
    """The receiving end's. A heartbeat is the longest pause between messages; so many missed, and the peer is gone."""
    transfer = settings.transfer
    return TransferSettings(
        bootstrap_timeout=transfer.bootstrap_timeout,
        waiting_timeout=transfer.waiting_timeout,
        transfer_timeout=transfer.transfer_timeout,
        peer_timeout=transfer.heartbeat_interval * transfer.heartbeat_max_failures,
        drain_timeout=transfer.drain_timeout,
        retry_interval=min(FIRST_RETRY_SECONDS, transfer.heartbeat_interval),
        retry_limit=transfer.heartbeat_interval,
        default_allocate_tokens=transfer.default_allocate_tokens,
    )


def encode_timeouts(settings: Settings) -> TransferSettings:
    """The sending end's. It waits for a language worker that has never spoken, or speaks no more, equally long: in both
    cases another one may come and ask."""
    return TransferSettings(
        bootstrap_timeout=settings.encode.unclaimed_timeout,
        lease_timeout=settings.encode.unclaimed_timeout,
        drain_timeout=settings.transfer.drain_timeout,
    )


def layout_of(fields: Sequence[FieldSpec]) -> Layout:
    """The engine's fields as the transfer's layout."""
    return Layout(tuple(Field(f.name, str(f.dtype).removeprefix("torch."), f.width) for f in fields))
