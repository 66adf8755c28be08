"""Plug-ins for vLLM that damage embeddings on their way, in the encoder's process and after any checksum was taken.

A plug-in damages nothing until the file exists that :data:`VARIABLE` names, and adds a byte to it each time.
"""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VARIABLE = "BENCH_DAMAGE_FILE"
"""Not ``EMBFERRY_…``: the router refuses unknown settings."""
DAMAGE_EVERY = 1_500_000
"""Bytes of embeddings that an encoder sends between two damages, which is one embedding in three or four."""
SMALLEST = 4096
"""Fewer bytes are no embedding, and are left alone."""
TAIL = 0.25
"""The share of a file that is zeroed, as if it had been cut short."""


class Damage:
    """Says which embedding to damage. The first comes sooner than :data:`DAMAGE_EVERY`."""

    def __init__(self) -> None:
        self._file, self._left, self._lock = Path(os.environ[VARIABLE]), DAMAGE_EVERY // 5, threading.Lock()

    def is_due(self, size: int) -> bool:
        """Counts ``size`` bytes; returns True if they are to be damaged, and adds a byte to the file."""
        if size < SMALLEST or not self._file.exists():
            return False
        with self._lock:
            self._left -= size
            if self._left > 0:
                return False
            self._left = DAMAGE_EVERY
            with self._file.open("ab") as file:
                file.write(b".")
        return True


def zeroed_tails() -> None:
    """Zeroes the tails of some of the example connector's files, before the language instance reads them."""
    from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector

    save, damage = ECExampleConnector.save_caches, Damage()

    def save_caches(self: Any, encoder_cache: Any, mm_hash: str, **kwargs: Any) -> None:
        save(self, encoder_cache, mm_hash, **kwargs)
        if self.is_producer:
            zero_tail(Path(self._generate_filename_debug(mm_hash)), damage)

    ECExampleConnector.save_caches = save_caches


def zero_tail(path: Path, damage: Damage) -> None:
    size = path.stat().st_size
    if damage.is_due(size):
        with path.open("r+b") as file:
            file.seek(int(size * (1 - TAIL)))
            file.write(bytes(size - file.tell()))


def flipped_bits() -> None:
    """Flips a bit in some embeddings that embferry sends: in the TCP stream, or in the receiver's shared memory."""
    import numpy as np

    from embferry.transports.net.cursor import Cursor
    from embferry.transports.shm import transport as shm
    from embferry.transports.tcp import send_link as tcp

    damage = Damage()

    def cursor(views: Sequence[memoryview]) -> Cursor:
        """Returns what the tcp transport sends: a frame's head, and the parts of an embedding."""
        return Cursor([flipped(view) if damage.is_due(view.nbytes) else view for view in views])

    def flipped(view: memoryview) -> memoryview:
        changed = bytearray(view)
        changed[_middle(len(changed))] ^= 0x40
        return memoryview(changed)

    def copyto(target: Any, source: Any) -> None:
        np.copyto(target, source)
        if damage.is_due(source.size):
            target[_middle(source.size)] ^= 0x40

    vars(tcp)["Cursor"] = cursor
    vars(shm)["np"] = types.SimpleNamespace(**vars(np) | {"copyto": copyto})


def _middle(size: int) -> int:
    """Returns the place of a byte in the middle that holds a float's exponent."""
    return size // 2 | 3


PLUGINS = {"example": zeroed_tails, "embferry": flipped_bits}
"""Plug-ins by the connector whose embeddings they damage."""
