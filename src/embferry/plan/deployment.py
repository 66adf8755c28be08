"""Which instances there are, and which arrangements of as many devices make sense."""

from __future__ import annotations

import msgspec

MOST_DEVICES = 64


class Deployment(msgspec.Struct, frozen=True):
    """Encoders and language instances; without encoders every instance does both."""

    encoders: int
    languages: int

    @property
    def is_split(self) -> bool:
        return self.encoders > 0

    @property
    def instances(self) -> int:
        return self.encoders + self.languages

    @property
    def name(self) -> str:
        if self.is_split:
            return f"{_count(self.encoders, 'encoder')}, {_count(self.languages, 'language instance')}"
        return f"undivided, {_count(self.languages, 'instance')}"


def arrangements(devices: int, *, shared: bool = False) -> list[Deployment]:
    """Returns every way to use the devices: undivided first, then the splits by their number of encoders.

    Args:
        devices: How many instances there are room for.
        shared: They share cores, so one undivided instance may use them all.
    """
    alone = [Deployment(0, 1)] if shared and devices > 1 else []
    split = [Deployment(encoders, devices - encoders) for encoders in range(1, devices)]
    return [*alone, Deployment(0, devices), *split]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
