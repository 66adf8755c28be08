"""Which deployment to take for a workload, and whether to split at all."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .capacity import Demands
from .deployment import MOST_DEVICES, Deployment, arrangements
from .errors import WorkloadInvalid
from .outcome import Outcome
from .pool import Pool, enough
from .simulation import DRAWS, play
from .speeds import Speeds
from .workload import Asked

FULL = 0.8
"""The most of its capacity that a deployment should be asked for: above it, waiting times grow fast."""
MARGIN = 0.1
"""Differences below this are not worth more processes, and are within what a plan gets wrong."""
MOST_SPLITS = 5
MOST_WORK = 200_000_000
"""Tokens of answers in all plays together, which take about a minute and a half."""
PART = 20
"""Tokens of answers that take as long to play as a request, a picture, or a part of a prompt."""
AT_ONCE = 100
"""Requests that come at once to find out how many a second instances on shared cores carry."""
SHARED_DEVICES = 3
"""Instances on cores that they share, if the user does not say: two encoders and a language instance."""


class Row(msgspec.Struct, frozen=True):
    """One deployment: the most requests a second that it carries, and what comes of those that are asked."""

    deployment: Deployment
    capacity: float
    outcome: Outcome
    rate: float
    """Requests a second that are asked."""

    @property
    def carries(self) -> bool:
        return self.rate <= self.capacity

    @property
    def order(self) -> tuple[bool, float]:
        """The better row comes first: one that carries the rate, with the shorter times; else one that carries more."""
        return (False, self.outcome.ttft(0.5) + self.outcome.ttft(0.95)) if self.carries else (True, -self.capacity)


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of the table, which of them to take, and the pool of each language instance of the best split."""

    rows: tuple[Row, ...]
    undivided: Row
    split: Row
    is_worth: bool
    why: str
    pool: Pool
    pool_why: str

    @property
    def best(self) -> Row:
        return self.split if self.is_worth else self.undivided

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
        WorkloadInvalid: no number of devices carries the rate, or the plays would take minutes.
    """
    devices = devices if devices is not None else fewest(asked, rate, speeds)
    found = arrangements(devices, shared=speeds.cores is not None)
    demands = {kind: Demands.of(asked, speeds, is_split=kind) for kind in (False, True)}
    most = {one: carried(asked, one, speeds, demands[one.is_split]) for one in found}
    splits = sorted((one for one in found if one.is_split), key=lambda one: -most[one])[:MOST_SPLITS]
    kept = [one for one in found if not one.is_split or one in splits]
    check_work(asked, kept, speeds)
    rows = tuple(Row(one, most[one], play(asked, one, speeds, token_bytes, pool), rate) for one in kept)
    undivided = min((row for row in rows if not row.deployment.is_split), key=lambda row: row.order)
    split = min((row for row in rows if row.deployment.is_split), key=lambda row: row.order)
    is_worth, why = verdict(undivided, split, is_shared=speeds.cores is not None)
    advised, reason = _pool(asked, split, block_size, pool)
    return Advice(
        rows=rows, undivided=undivided, split=split, is_worth=is_worth, why=why, pool=advised, pool_why=reason
    )


def check_work(asked: Sequence[Asked], deployments: Sequence[Deployment], speeds: Speeds) -> None:
    """Checks that all plays together take a minute or two.

    Raises:
        WorkloadInvalid: they would take longer; the text says which option to change.
    """
    plays = sum(DRAWS if one.encoders > 1 else 1 for one in deployments)
    steps = sum(
        one.output_tokens + PART * (1 + len(one.pictures) + one.prompt_tokens // speeds.batch_tokens) for one in asked
    )
    if plays * steps <= MOST_WORK:
        return
    fewer = len(asked) * MOST_WORK // (plays * steps)
    if fewer >= 2:
        raise WorkloadInvalid(f"--requests {len(asked)}: too many to play through {plays} times; give {fewer} at most")
    raise WorkloadInvalid(
        f"a prompt of {asked[0].prompt_tokens:,} tokens takes too many steps of batch_tokens ({speeds.batch_tokens})"
    )


def carried(asked: Sequence[Asked], deployment: Deployment, speeds: Speeds, demands: Demands) -> float:
    """Returns the most requests a second that a deployment carries.

    On shared cores a slow stage gets only its share of them, however little the others need it to wait. So the bound is
    lowered there to what the deployment does with requests that come all at once.
    """
    bound = demands.capacity(deployment)
    if speeds.cores is None:
        return bound
    at_once = [msgspec.structs.replace(one, at=0.0) for one in asked[:AT_ONCE]]
    return min(bound, play(at_once, deployment, speeds).throughput)


def fewest(asked: Sequence[Asked], rate: float, speeds: Speeds) -> int:
    """Returns the fewest devices with which a deployment carries the rate with a reserve.

    Raises:
        WorkloadInvalid: there is none.
    """
    if speeds.cores is not None:
        return SHARED_DEVICES
    demands = {kind: Demands.of(asked, speeds, is_split=kind) for kind in (False, True)}
    for devices in range(2, MOST_DEVICES + 1):
        if any(rate <= FULL * demands[one.is_split].capacity(one) for one in arrangements(devices)):
            return devices
    raise WorkloadInvalid(
        f"--rate {rate:g}: {MOST_DEVICES} devices do not carry it; lower it, or name their number: --devices N"
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
    digits = 1 if max(before, after) < 0.0995 else 0
    return f"{after * 1e3:.{digits}f} ms instead of {before * 1e3:.{digits}f} ms"


def _pool(asked: Sequence[Asked], split: Row, block_size: int, given: Pool | None) -> tuple[Pool, str]:
    """Returns the pool to take, and why."""
    largest = max(one.visual_tokens for one in asked)
    needed = max(largest, split.outcome.peak_arriving)
    best = enough(needed, block_size)
    if needed > largest:
        why = f"{needed:,} tokens were under way to one language instance at the busiest moment, so none is resumed"
    else:
        why = f"the embeddings of the largest request, {largest:,} tokens; no more were under way at once"
    if given is not None:
        resumes = f"{split.outcome.resumes:,} resumed transfers for {len(split.outcome.requests):,} requests"
        why += f"; with the {given.tokens:,} tokens given there are {resumes}"
    return best, why
