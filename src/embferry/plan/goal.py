"""The smallest fleet whose median time to first token meets a goal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from .advice import FULL, SHARED_DEVICES, Advice, Row, advice_of, arranged, compare, seconds_text, smallest_carrying
from .capacity import Demands
from .deployment import MOST_DEVICES, Deployment
from .errors import GoalNotMet, RateNotCarried, WorkloadInvalid
from .pool import Pool
from .speeds import Speeds
from .workload import Asked

MOST_GOAL = 1e6
SEARCH_WORK = 250_000
"""The most work of playing one number of devices while the smallest is looked for."""


def advise_for(
    goal: float,
    asked: Sequence[Asked],
    rate: float,
    speeds: Speeds,
    token_bytes: int,
    *,
    block_size: int = 128,
    devices: int | None = None,
    pool: Pool | None = None,
) -> Advice:
    """Returns the advice for the smallest number of devices that meets a goal.

    A deployment meets it if its median time to first token does, and if it is asked for no more of its capacity than
    any deployment should be.

    Args:
        goal: Seconds.
        asked: The requests.
        rate: Of them, a second.
        speeds: How long each stage takes.
        token_bytes: Bytes of a visual token of an embedding.
        block_size: Tokens of a block of the pool.
        devices: The most that there may be; None for as many as a plan arranges.
        pool: Of each language instance; None for one that is large enough.

    Raises:
        GoalNotMet: no number of devices meets the goal.
        RateNotCarried: no number of devices carries the rate.
        WorkloadInvalid: the goal is none, or one request alone would take minutes to play.
    """
    if not 0 < goal <= MOST_GOAL:
        raise WorkloadInvalid(f"--ttft-goal {goal:g}: give more than 0 seconds, and at most {MOST_GOAL:,.0f}")
    most, least = devices or _most(speeds), 1
    if speeds.cores is None:
        least = min(most, smallest_carrying(Demands.both(asked, speeds, token_bytes), rate).instances)
    seen: dict[int, float] = {}

    def rows(count: int) -> tuple[Row, ...]:
        return compare(asked, rate, speeds, token_bytes, _found(count, speeds), pool=pool, most_work=SEARCH_WORK)[0]

    def time(count: int) -> float:
        try:
            seen[count] = min(_time(row) for row in rows(count) if row.deployment.instances <= count)
        except RateNotCarried:
            seen[count] = math.inf
        return seen[count]

    def advice(count: int) -> Advice | None:
        """Returns the advice for so many devices if they meet the goal when all is played."""
        try:
            played, part = compare(asked, rate, speeds, token_bytes, _found(count, speeds), pool=pool)
        except RateNotCarried:
            return None
        seen[count] = min(_time(row) for row in played if row.deployment.instances <= count)
        meet = [row for row in played if row.deployment.instances <= count and _time(row) <= goal]
        if not meet:
            return None
        fewest = min(meet, key=lambda row: (row.deployment.instances, row.order))
        found = advice_of(asked, played, part, speeds, block_size, pool)
        return msgspec.structs.replace(found, goal=goal, fewest=fewest)

    count = smallest(time, goal, least, most)
    found = advice(count) if count is not None else None
    while count is not None and found is None and count < most:
        found = advice(count := count + 1)  # few requests were played before, and more of them say something else
    if count is None or found is None:
        rows(most)  # tells it if not even the rate is carried
        raise GoalNotMet(_not_met(goal, most, seen, is_shared=speeds.cores is not None))
    while count > least and (fewer := advice(count := count - 1)) is not None:
        found = fewer
    return found


def smallest(time: Callable[[int], float], goal: float, least: int, most: int) -> int | None:
    """Returns the fewest devices that meet a goal, or None if the most do not.

    Each step upwards is twice the one before, until the goal is met; then the gap is halved. So only a few numbers are
    played. This takes it that more devices are never slower.

    Args:
        time: Of the best arrangement of so many devices, in seconds.
        goal: In seconds.
        least: The first number to try.
        most: The last one.
    """
    below, count, step = least - 1, least, 1
    while time(count) > goal:
        if count == most:
            return None
        below, count, step = count, min(most, count + step), step * 2
    while count - below > 1:
        middle = (below + count) // 2
        if time(middle) <= goal:
            count = middle
        else:
            below = middle
    return count


def _most(speeds: Speeds) -> int:
    """Returns the most devices to try: of those that share cores, two for each core."""
    if speeds.cores is None:
        return MOST_DEVICES
    return min(MOST_DEVICES, max(SHARED_DEVICES, 2 * math.ceil(min(speeds.cores, MOST_DEVICES))))


def _found(count: int, speeds: Speeds) -> list[Deployment]:
    """Returns every way to use the devices. One device alone is shown beside those of two, of which one is split."""
    alone = Deployment(0, 1)
    found = arranged(max(2, count), speeds)
    return found if count > 1 or alone in found else [alone, *found]


def _time(row: Row) -> float:
    return row.ttft if row.used <= FULL else math.inf


def _not_met(goal: float, most: int, seen: dict[int, float], *, is_shared: bool) -> str:
    kind = "instances that share these cores" if is_shared else "devices"
    count = min(seen, key=lambda one: (seen[one], one))
    if math.isinf(seen[count]):
        best = f"none of them carries the rate with a reserve of {1 - FULL:.0%}"
        return f"--ttft-goal {goal:g}: it cannot be met with up to {most} {kind}: {best}"
    best = f"the shortest median, with {count}, is {seconds_text(seen[count])}"
    return f"--ttft-goal {goal:g}: it cannot be met with up to {most} {kind}: {best}. Faster stages are needed"
