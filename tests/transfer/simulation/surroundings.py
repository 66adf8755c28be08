"""Constants and classes of this project that are replaced while a story is played."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from embferry.testing.virtual import VirtualWorld
from embferry.transfer import checksums, device_sink, staging, writer

from .doubles import PatientExecutor


@contextmanager
def surroundings(world: VirtualWorld, token_bytes: int, block_size: int) -> Iterator[None]:
    """Threads of sinks and of staging run in the world, and logs are off.

    Checksums of chunks of a whole block or more are taken token by token, in several turns.
    """
    real = device_sink.ThreadPoolExecutor, staging.ThreadPoolExecutor
    sizes = checksums.PASS_BYTES, writer.AT_ONCE_BYTES
    checksums.PASS_BYTES, writer.AT_ONCE_BYTES = token_bytes, (block_size - 1) * token_bytes
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    for module in (device_sink, staging):
        module.ThreadPoolExecutor = lambda *_, **__: PatientExecutor(world)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        device_sink.ThreadPoolExecutor, staging.ThreadPoolExecutor = real  # type: ignore[misc]
        checksums.PASS_BYTES, writer.AT_ONCE_BYTES = sizes
        logging.disable(disabled)
