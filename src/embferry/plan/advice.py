"""Which deployment to take for a workload, and whether to split at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from .capacity import CORES, Demands
from .deployment import MOST_DEVICES, Deployment, arrangements
from .effort import Effort, effort
from .errors import RateNotCarried
from .outcome import Outcome
from .pool import Pool, enough
from .simulation import play
from .speeds import Speeds
from .workload import Asked

FULL = 0.8
"""The most of its capacity that a deployment should be asked for: above it, waiting times grow fast."""
MARGIN = 0.1
"""Differences below this are not worth more processes, and are within what a plan gets wrong."""
MOST_SPLITS = 5
AT_ONCE = 100
"""Requests that come at once to find out how many a second instances on shared cores carry."""
AT_ONCE_WORK = 300_000
"""The most work of playing them in one arrangement."""
LONG_S = 60.0
"""Times of a minute or more are told in seconds, shorter ones in milliseconds."""
SHARED_DEVICES = 3
"""Instances on cores that they share, if the user does not say: two encoders and a language instance."""


class Row(msgspec.Struct, frozen=True):
    """One deployment: the most requests a second that it carries, and what comes of those that are asked."""

    deployment: Deployment
    capacity: float
    outcome: Outcome | None
    """None if the deployment does not carry the rate: the longer it lasts, the longer requests wait."""
    rate: float
    """Requests a second that are asked."""

    @property
    def carries(self) -> bool:
        return self.rate <= self.capacity

    @property
    def used(self) -> float:
        """The share of its capacity that is asked for."""
        return self.rate / self.capacity

    @property
    def ttft(self) -> float:
        """The median time to first token in seconds, infinite if the deployment does not carry the rate."""
        return self.outcome.ttft(0.5) if self.carries and self.outcome is not None else math.inf

    @property
    def order(self) -> tuple[bool, float]:
        """The better row comes first: one that carries the rate, with the shorter times; else one that carries more."""
        if not self.carries or self.outcome is None:
            return True, -self.capacity
        return False, self.outcome.ttft(0.5) + self.outcome.ttft(0.95)


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of the table, which of them to take, and the pool of each language instance of the best split."""

    rows: tuple[Row, ...]
    undivided: Row
    split: Row
    is_worth: bool
    why: str
    pool: Pool
    pool_why: str
    played: str = ""
    """The part of the requests that was played, in words; empty for all."""
    goal: float | None = None
    """Seconds that the median time to first token may take; None for no goal."""
    fewest: Row | None = None
    """With a goal: the smallest deployment that meets it."""

    @property
    def best(self) -> Row:
        return self.fewest or (self.split if self.is_worth else self.undivided)

    @property
    def sentence(self) -> str:
        return f"{'Worth it' if self.is_worth else 'Not worth it'}: {self.why}"


def advise(
    asked: Sequence[Asked],
    rate: float,
    speeds: Speeds,
    token_bytes: int,
    *,
    block_size: int = 128,
    devices: int | None = None,
    pool: Pool | None = None,
) -> Advice:
    """Compares the deployments.

    Args:
        asked: The requests.
        rate: Of them, a second.
        speeds: How long each stage takes.
        token_bytes: Bytes of a visual token of an embedding.
        block_size: Tokens of a block of the pool.
        devices: Instances there are room for; None: as few as carry the rate with a reserve.
        pool: Of each language instance; None for one that is large enough.

    Raises:
        RateNotCarried: no arrangement of the devices carries the rate, or no number of devices.
        WorkloadInvalid: one request alone would take minutes to play.
    """
    demands = Demands.both(asked, speeds, token_bytes)
    devices = devices if devices is not None else _fewest(demands, rate)
    rows, part = compare(asked, rate, speeds, token_bytes, arranged(devices, speeds), pool=pool)
    return advice_of(asked, rows, part, speeds, block_size, pool)


def arranged(devices: int, speeds: Speeds) -> list[Deployment]:
    """Returns every way to use the devices."""
    return arrangements(devices, shared=speeds.cores is not None)


def compare(
    asked: Sequence[Asked],
    rate: float,
    speeds: Speeds,
    token_bytes: int,
    found: Sequence[Deployment],
    *,
    pool: Pool | None = None,
    most_work: int | None = None,
) -> tuple[tuple[Row, ...], Effort]:
    """Plays the requests through deployments: the undivided ones, and the splits that carry most.

    Args:
        asked: The requests.
        rate: Of them, a second.
        speeds: How long each stage takes.
        token_bytes: Bytes of a visual token of an embedding.
        found: The deployments.
        pool: Of each language instance.
        most_work: Of all plays; None for that of a whole plan.

    Returns:
        A row for each, and how much was played.

    Raises:
        RateNotCarried: none of them carries the rate.
        WorkloadInvalid: one request alone would take minutes to play.
    """
    demands = Demands.both(asked, speeds, token_bytes)
    bounds = {one: demands[one.is_split].capacity(one) for one in found}
    splits = sorted((one for one in found if one.is_split), key=lambda one: -bounds[one])[:MOST_SPLITS]
    kept = [one for one in found if not one.is_split or one in splits]
    most = {one: carried(asked, one, speeds, demands[one.is_split], token_bytes) for one in kept}
    if not any(rate <= most[one] for one in kept):
        raise RateNotCarried(_not_carried(demands, rate, max(kept, key=lambda one: most[one]), most))
    playing = [one for one in kept if rate <= most[one]]
    part = effort(asked, playing, speeds) if most_work is None else effort(asked, playing, speeds, most_work)

    def played(one: Deployment) -> Outcome:
        return play(asked[: part.requests], one, speeds, token_bytes, pool, draws=part.draws)

    return tuple(Row(one, most[one], played(one) if one in playing else None, rate) for one in kept), part


def advice_of(
    asked: Sequence[Asked], rows: tuple[Row, ...], part: Effort, speeds: Speeds, block_size: int, pool: Pool | None
) -> Advice:
    """Returns the advice that follows from the rows, at least one of them undivided and one split."""
    undivided = min((row for row in rows if not row.deployment.is_split), key=lambda row: row.order)
    split = min((row for row in rows if row.deployment.is_split), key=lambda row: row.order)
    is_worth, why = verdict(undivided, split, is_shared=speeds.cores is not None)
    advised, reason = _pool(asked, split, block_size, pool)
    return Advice(
        rows=rows,
        undivided=undivided,
        split=split,
        is_worth=is_worth,
        why=why,
        pool=advised,
        pool_why=reason,
        played=part.told(len(asked)),
    )


def carried(
    asked: Sequence[Asked], deployment: Deployment, speeds: Speeds, demands: Demands, token_bytes: int = 0
) -> float:
    """Returns the most requests a second that a deployment carries.

    On shared cores a slow stage gets only its share of them, however little the others need it to wait. So the bound is
    lowered there to what the deployment does with requests that come all at once.
    """
    bound = demands.capacity(deployment)
    if speeds.cores is None:
        return bound
    at_once = [msgspec.structs.replace(one, at=0.0) for one in asked[:AT_ONCE]]
    part = effort(at_once, [deployment], speeds, AT_ONCE_WORK)
    return min(bound, play(at_once[: part.requests], deployment, speeds, token_bytes, draws=part.draws).throughput)


def fewest(asked: Sequence[Asked], rate: float, speeds: Speeds, token_bytes: int = 0) -> int:
    """Returns the fewest devices with which a deployment carries the rate with a reserve.

    Raises:
        RateNotCarried: there is none.
    """
    return _fewest(Demands.both(asked, speeds, token_bytes), rate)


def _fewest(demands: dict[bool, Demands], rate: float) -> int:
    if demands[False].speeds.cores is not None:
        return SHARED_DEVICES
    smallest = smallest_carrying(demands, rate)
    if smallest.instances > MOST_DEVICES:
        raise RateNotCarried(
            f"--rate {rate:g}: {MOST_DEVICES} devices do not carry it; it takes {smallest.instances:,} "
            f"({smallest.name}) by the demand law. Lower it, or name the number of devices: --devices N"
        )
    return max(2, smallest.instances)


def smallest_carrying(demands: dict[bool, Demands], rate: float) -> Deployment:
    """Returns the smallest deployment that carries the rate with a reserve, by the demand law."""
    return min((one.fewest(rate / FULL) for one in demands.values()), key=lambda one: one.instances)


def _not_carried(demands: dict[bool, Demands], rate: float, best: Deployment, most: dict[Deployment, float]) -> str:
    """Returns that nothing carries the rate, what carries most, and how much it would take."""
    stages, devices = demands[best.is_split].stages(best), max(one.instances for one in most)
    smallest = smallest_carrying(demands, rate)
    cores = demands[smallest.is_split].stages(smallest).get(CORES, 0.0) * (demands[False].speeds.cores or 0.0)
    needs = f"{smallest.instances:,} devices ({smallest.name})"
    if cores:
        needs = f"{cores * rate / FULL:.3g} cores, and {smallest.instances:,} instances ({smallest.name})"
    return (
        f"--rate {rate:g}: no arrangement of {devices} {'instances' if cores else 'devices'} carries it. The most is "
        f"{most[best]:.3g} requests/s ({best.name}), where {max(stages, key=lambda name: stages[name])} is the slowest "
        f"stage. By the demand law it takes {needs}"
    )


def verdict(undivided: Row, split: Row, *, is_shared: bool) -> tuple[bool, str]:
    """Returns whether splitting is worth it, and why."""
    if split.carries != undivided.carries:
        better, worse = (split, undivided) if split.carries else (undivided, split)
        return split.carries, (
            f"{better.deployment.name} carry up to {better.capacity:.3g} requests/s, {worse.deployment.name} only "
            f"{worse.capacity:.3g}, less than the {split.rate:.3g} asked for."
        )
    if not split.carries:
        is_more = split.capacity > undivided.capacity * (1 + MARGIN)
        return is_more, (
            f"neither carries {split.rate:.3g} requests/s; split, the devices carry {split.capacity:.3g}, undivided "
            f"{undivided.capacity:.3g}. {'They need more cores' if is_shared else 'Give more devices: --devices N'}."
        )
    before, after = undivided.outcome, split.outcome
    assert before is not None
    assert after is not None, "what carries the rate was played"
    pairs = {
        "the time to first token is {} in the median": (before.ttft(0.5), after.ttft(0.5)),
        "{} at the 95th percentile": (before.ttft(0.95), after.ttft(0.95)),
        "the whole answer takes {} at the 95th percentile": (before.latency(0.95), after.latency(0.95)),
    }
    ratios = [then / max(now, 1e-9) for now, then in pairs.values()]
    gains, loses = min(ratios) < 1 - MARGIN, max(ratios) >= 1 + MARGIN
    median, tail, whole = (words.format(_times(*pair)) for words, pair in pairs.items())
    times = f"split, {median} and {tail}, and {whole}"
    if gains and not loses:
        return True, f"{times}."
    if gains:
        return False, f"{times}: it gains at one and loses at another."
    if not loses:
        return False, f"{times}: too little for the more that there is to run."
    if is_shared:
        return False, f"{times}: both work on the same cores, and splitting adds work."
    return False, f"{times}: splitting adds a way, and takes instances from one of the stages."


def _times(before: float, after: float) -> str:
    if max(before, after) >= LONG_S:
        return f"{seconds_text(after)} instead of {seconds_text(before)}"
    digits = 1 if max(before, after) < 0.0995 else 0
    return f"{after * 1e3:.{digits}f} ms instead of {before * 1e3:.{digits}f} ms"


def seconds_text(seconds: float) -> str:
    """Returns a long time in seconds, with three figures."""
    return f"{float(f'{seconds:.3g}'):,g} s"


def _pool(asked: Sequence[Asked], split: Row, block_size: int, given: Pool | None) -> tuple[Pool, str]:
    """Returns the pool to take, and why."""
    largest = max(one.visual_tokens for one in asked)
    outcome = split.outcome
    needed = max(largest, outcome.peak_arriving if outcome is not None else 0)
    best = enough(needed, block_size)
    if outcome is None:
        why = f"the embeddings of the largest request, {largest:,} tokens; a split does not carry the rate"
    elif needed > largest:
        why = f"{needed:,} tokens were under way to one language instance at the busiest moment, so none is resumed"
    else:
        why = f"the embeddings of the largest request, {largest:,} tokens; no more were under way at once"
    if given is not None and outcome is not None:
        resumes = f"{outcome.resumes:,} resumed transfers for {len(outcome.requests):,} requests"
        why += f"; with the {given.tokens:,} tokens given there are {resumes}"
    return best, why
