"""Time-outs and layout of transfers, from the settings of a worker."""

from __future__ import annotations

import torch

from embferry.protocol.settings import TransferSettings
from embferry.serve.config import Settings

FIRST_RETRY_SECONDS = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Torch's dtype for each value of the setting ``dtype``."""


def language_timeouts(settings: Settings) -> TransferSettings:
    """Returns the settings of the receiving end.

    A peer sends at least one message per heartbeat interval, and is gone after ``heartbeat_max_failures`` silent ones.
    """
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
    """Returns the settings of the sending end.

    It waits equally long for a first language worker and for a successor of one that has gone silent.
    """
    return TransferSettings(
        bootstrap_timeout=settings.encode.unclaimed_timeout,
        lease_timeout=settings.encode.unclaimed_timeout,
        drain_timeout=settings.transfer.drain_timeout,
    )
