"""Time-outs and layout of transfers, from the settings of a worker."""

from __future__ import annotations

import torch

from embferry.memory.limits import default_max_embedding_bytes
from embferry.protocol.settings import TransferSettings
from embferry.serve.config import Settings
from embferry.serve.http.descriptors import within_open_files
from embferry.transfer.control.limits import DEFAULTS, ControlLimits

FIRST_RETRY_SECONDS = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Torch's dtype for each value of the setting ``dtype``."""


def language_timeouts(settings: Settings) -> TransferSettings:
    """Returns the settings of the receiving end.

    A peer sends at least one message per heartbeat interval, and is gone after ``heartbeat_max_failures`` silent ones.
    """
    transfer = settings.transfer
    silence = transfer.heartbeat_interval * transfer.heartbeat_max_failures
    return TransferSettings(
        bootstrap_timeout=transfer.bootstrap_timeout,
        answer_timeout=transfer.answer_timeout,
        waiting_timeout=transfer.waiting_timeout,
        transfer_timeout=transfer.transfer_timeout,
        peer_timeout=silence,
        drain_timeout=transfer.drain_timeout,
        retry_interval=min(FIRST_RETRY_SECONDS, transfer.heartbeat_interval),
        retry_limit=transfer.heartbeat_interval,
        default_allocate_tokens=transfer.default_allocate_tokens,
        max_embedding_bytes=transfer.max_embedding_bytes or default_max_embedding_bytes(),
    )


def encode_timeouts(settings: Settings) -> TransferSettings:
    """Returns the settings of the sending end.

    It waits equally long for a first language worker and for a successor of one that has gone silent.
    """
    return TransferSettings(
        bootstrap_timeout=settings.encode.unclaimed_timeout,
        lease_timeout=settings.encode.unclaimed_timeout,
        drain_timeout=settings.transfer.drain_timeout,
        parked_requests=settings.transfer.parked_requests,
        parked_bytes=settings.transfer.parked_bytes,
    )


def control_limits(settings: Settings) -> ControlLimits:
    """Returns the bounds of a worker's control connections, which may use a quarter of its open files."""
    transfer = settings.transfer
    connections = within_open_files(transfer.control_connections, 0.25)
    return ControlLimits(
        connections=connections,
        connections_per_address=min(transfer.control_connections_per_address, connections),
        handshakes=min(DEFAULTS.handshakes, connections),
        handshakes_per_address=min(DEFAULTS.handshakes_per_address, connections),
        unsent_bytes=transfer.control_unsent_bytes,
        unsent_bytes_per_peer=transfer.control_unsent_bytes_per_peer,
        connect_timeout=transfer.control_connect_timeout,
    )
