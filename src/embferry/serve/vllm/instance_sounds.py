"""Protects an instance of vLLM from sounds whose rate would cost gigabytes.

torchaudio changes the rate of a sound with a table, whose size is the product of both rates without their common
divisor. From 44,100 samples a second to 16,000, it has 70,560 numbers; from 15,999, it has 256 million, several times
over, for a file of a few bytes. vLLM keeps the last 32 tables.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from embferry.serve.vllm.instance_part import part_of_vllm

log = logging.getLogger(__name__)

MODULE = "vllm.multimodal.audio"
MAKER = "_get_torchaudio_resampler"
DANGER = "a sound of an odd rate may end the instance"
MAX_TABLE = 1 << 22
"""Numbers in a table. Every usual rate takes fewer: 11,025 to 16,000 takes 282,240."""

Maker = Callable[[int, int], Any]


class _Bounded:
    """Makes what changes the rate of sounds, if its table is small.

    Args:
        make: vLLM's own function.
    """

    def __init__(self, make: Maker) -> None:
        self._make = make

    def __call__(self, orig_sr: int, target_sr: int) -> Any:
        """Returns what ``make`` returns.

        Raises:
            ValueError: the table would be large.
        """
        if orig_sr <= 0 or table_size(orig_sr, target_sr) > MAX_TABLE:
            raise ValueError(
                f"A sound of {orig_sr} samples a second cannot be resampled to {target_sr}: it takes too much memory."
            )
        return self._make(orig_sr, target_sr)


def table_size(rate: int, wanted: int) -> int:
    """Returns about how many numbers torchaudio's table has."""
    shared = math.gcd(rate, wanted)
    return (rate // shared) * (wanted // shared)


def protect() -> None:
    """Bounds vLLM's tables in this process, if vLLM is installed here."""
    if (audio := part_of_vllm(MODULE, DANGER)) is None:
        return
    make = getattr(audio, MAKER, None)
    if make is None:
        log.warning("%s changes rates in another way: %s", MODULE, DANGER)
    elif not isinstance(make, _Bounded):
        setattr(audio, MAKER, _Bounded(make))
