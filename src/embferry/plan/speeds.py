"""How long each stage of a request takes when nothing else runs."""

from __future__ import annotations

import msgspec

from .curve import Curve
from .errors import SpeedsInvalid

LEAST_SECONDS, MOST_SECONDS = 1e-12, 1e6
"""Bounds of the time of a stage. Beyond them, times are lost in the rounding of a clock."""
MOST = 1e18
NOISY = 0.1
"""The most by which a measured median may be off: half of what a plan may be off."""
LEAST = {"cores": 0.001, "load": 0.001, "split_load": 0.001}
"""The least amounts of what the instances share; of the others 1."""


class Speeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds of every stage, and what the instances share.

    Attributes:
        encode: The vision encoder, for a picture of ``n`` visual tokens.
        prefill: The language model, for a prompt of ``n`` tokens, visual ones included, in addition to ``step.base``.
        step: One step of the language model in which ``n`` requests get a token each.
        prepare: The front end of the instance that encodes, for a picture of ``n`` tokens: it reads the file, resizes
            it and cuts it into patches.
        request: The front end, for every request: HTTP, chat template, tokenizer.
        handover: What splitting adds for a picture of ``n`` tokens between encoder and prefill, the transfer included
            unless ``bandwidth`` is given.
        split_request: What splitting adds to every request: the router.
        split_step: A step of a language instance whose tokens go through the router; None if that adds nothing.
        bandwidth: Bytes a second of each language instance's link, which the transfers to it share; None if
            ``handover`` includes the transfer.
        resume: Seconds of one resumed transfer, when the pool is smaller than what arrives.
        cores: Cores that all instances share; None if each has a device of its own.
        load: Cores that one busy instance fills. Above 1 if it works on several threads.
        split_load: The same of the instances of a split deployment.
        batch_tokens: Most prompt tokens in one step of the language model.
        batch_requests: Most requests that one language model runs at once.
        slack: A picture goes to the encoder that its content names, unless that has this many more pictures under way
            than the idlest one; ``vllm.affinity_slack`` of the router.
        source: Where the figures come from, for people.
        noise: How far the median of one kind of measured request may be off, as a share of it, at the noisiest kind.
    """

    encode: Curve
    prefill: Curve
    step: Curve
    prepare: Curve = Curve()
    request: float = 0.0
    handover: Curve = Curve()
    split_request: float = 0.0
    split_step: Curve | None = None
    bandwidth: float | None = None
    resume: float = 0.001
    cores: float | None = None
    load: float = 1.0
    split_load: float = 1.0
    batch_tokens: int = 4096
    batch_requests: int = 64
    slack: int = 4
    source: str = "given"
    noise: float = 0.0

    @property
    def when_split(self) -> Speeds:
        """The same with the steps and the load of a split deployment in place of those of an undivided engine."""
        step = self.step if self.split_step is None else self.split_step
        return msgspec.structs.replace(self, step=step, load=self.split_load)

    @property
    def noisy(self) -> str:
        """A warning that the speeds were computed from noisy times, and what to do; empty if they were not."""
        if self.noise <= NOISY:
            return ""
        return (
            f"noisy: the same request took such different times that their median is known to {self.noise:.0%} only, "
            f"and a plan needs {NOISY:.0%}. Measure again while nothing else runs on the machines, or with a "
            "larger --repeats"
        )

    def check(self) -> None:
        """Checks the values.

        Raises:
            SpeedsInvalid: one is impossible; the text says which.
        """
        curves = {"encode": self.encode, "prefill": self.prefill, "step": self.step, "prepare": self.prepare}
        more = {"handover": self.handover, "split_step": self.split_step or self.step}
        numbers = {
            f"{name}.{part}": getattr(curve, part)
            for name, curve in (curves | more).items()
            for part in Curve.__struct_fields__
        }
        numbers |= {"request": self.request, "split_request": self.split_request, "resume": self.resume}
        for name, value in numbers.items():
            if not 0 <= value <= MOST_SECONDS:
                why = f"it has to be a number of seconds, at least 0 and at most {MOST_SECONDS:g}"
                raise SpeedsInvalid(f"{name} is {value:g}; {why}")
        positive = {"bandwidth": self.bandwidth, "cores": self.cores, "load": self.load, "split_load": self.split_load}
        positive |= {"batch_tokens": self.batch_tokens, "batch_requests": self.batch_requests}
        for name, amount in positive.items():
            least = LEAST.get(name, 1)
            if amount is not None and not least <= amount <= MOST:
                why = f"it has to be at least {least:g} and at most {MOST:g}"
                raise SpeedsInvalid(f"{name} is {min(amount, 1e300):g}; {why}")
        if not 0 <= self.noise <= MOST:
            raise SpeedsInvalid(f"noise is {min(self.noise, 1e300):g}; it has to be at least 0")
        if not 0 <= self.slack <= MOST:
            raise SpeedsInvalid(f"slack is {min(self.slack, 1e300):g}; it has to be at least 0 and at most {MOST:g}")
        if min(self.encode.at(1), self.prefill.at(1) + self.step.at(1)) < LEAST_SECONDS:
            raise SpeedsInvalid(f"encode, and prefill or step, have to take some time, at least {LEAST_SECONDS:g} s")


def decoded(data: bytes, where: str) -> Speeds:
    """Returns the speeds in the bytes of a JSON file.

    Raises:
        SpeedsInvalid: the bytes are something else, or a value is impossible.
    """
    try:
        found = msgspec.json.decode(data, type=Speeds)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SpeedsInvalid(f"{where} has no speeds: {error}; embferry plan --measure writes such a file") from error
    found.check()
    return found


def encoded(speeds: Speeds) -> bytes:
    return msgspec.json.format(msgspec.json.encode(speeds), indent=1) + b"\n"
