"""Which deployment to take, and whether splitting is worth it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embferry.plan.advice import Row, advise, check_work, fewest, verdict
from embferry.plan.curve import Curve
from embferry.plan.deployment import Deployment, arrangements
from embferry.plan.errors import WorkloadInvalid
from embferry.plan.outcome import Ended, Outcome
from embferry.plan.pool import Pool
from embferry.plan.simulation import play
from embferry.plan.workload import Asked, Workload

from .examples import SPEEDS, asked

BUSY = Workload(pictures=(100, 100), rate=6.0, burstiness_cv=3.0, output_tokens=8, requests=100)


def row(deployment: Deployment, *ttfts: float, capacity: float = 10.0, rate: float = 1.0) -> Row:
    """Returns a row with these times to first token."""
    return Row(deployment, capacity, Outcome(requests=[Ended(0.0, t, 1 + t / 100) for t in ttfts], duration=9.0), rate)


WHOLE, SPLIT = Deployment(0, 2), Deployment(1, 1)


def test_every_way_to_use_the_devices() -> None:
    assert arrangements(3) == [Deployment(0, 3), Deployment(1, 2), Deployment(2, 1)]
    assert arrangements(3, shared=True)[0] == Deployment(0, 1), "one instance may use all cores"


@pytest.mark.parametrize(
    ("whole", "split", "worth", "words"),
    [
        ((0.10, 0.10, 0.20), (0.05, 0.05, 0.10), True, "is 50 ms instead of 100 ms in the median"),
        ((0.10, 0.10, 0.20), (0.05, 0.05, 0.205), True, "at the 95th percentile"),
        ((0.10, 0.10, 0.20), (0.20, 0.20, 0.40), False, "takes instances from one of the stages"),
        ((0.10, 0.10, 0.20), (0.10, 0.10, 0.19), False, "too little"),
        ((0.10, 0.10, 0.20), (0.05, 0.05, 0.30), False, "loses at another"),
    ],
)
def test_splitting_is_worth_it_if_first_tokens_come_sooner(
    whole: tuple[float, ...], split: tuple[float, ...], worth: bool, words: str
) -> None:
    found, why = verdict(row(WHOLE, *whole), row(SPLIT, *split), is_shared=False)
    assert (found, words in why) == (worth, True), why


@pytest.mark.parametrize(("split", "worth"), [(0.5, True), (0.95, False), (1.5, False)])
def test_splitting_is_worth_it_if_answers_end_sooner(split: float, worth: bool) -> None:
    def answering(deployment: Deployment, seconds: float) -> Row:
        return Row(deployment, 10.0, Outcome(requests=[Ended(0.0, 0.1, 0.1 + seconds)], duration=9.0), 1.0)

    found, why = verdict(answering(WHOLE, 1.0), answering(SPLIT, split), is_shared=False)
    assert (found, f"the whole answer takes {100 + split * 1000:.0f} ms instead of 1100 ms" in why) == (worth, True)


def test_slower_on_shared_cores_says_why() -> None:
    found, why = verdict(row(WHOLE, 0.1, 0.2), row(SPLIT, 0.2, 0.4), is_shared=True)
    assert (found, "splitting adds work" in why) == (False, True)


def test_the_one_that_carries_the_rate_wins_however_slow_it_is() -> None:
    slow = row(SPLIT, 5.0, rate=4.0, capacity=5.0)
    assert verdict(row(WHOLE, 0.1, rate=4.0, capacity=3.0), slow, is_shared=False)[0]
    other = row(WHOLE, 5.0, rate=4.0, capacity=5.0)
    found, why = verdict(other, row(SPLIT, 0.1, rate=4.0, capacity=3.0), is_shared=False)
    assert not found
    assert "less than the 4 asked for" in why


def test_if_neither_carries_the_rate_more_devices_are_asked_for() -> None:
    split = row(SPLIT, 1.0, rate=40.0, capacity=12.0)
    found, why = verdict(row(WHOLE, 1.0, rate=40.0), split, is_shared=False)
    assert found
    assert "--devices" in why
    assert "more cores" in verdict(row(WHOLE, 1.0, rate=40.0), split, is_shared=True)[1]


def test_the_advice_on_devices_of_their_own() -> None:
    advice = advise(BUSY.asked(), BUSY.rate, SPEEDS, 4096, block_size=16)
    assert {one.deployment.instances for one in advice.rows} == {fewest(BUSY.asked(), BUSY.rate, SPEEDS)}
    assert advice.best in (advice.undivided, advice.split)
    assert advice.sentence.startswith("Worth it" if advice.is_worth else "Not worth it")
    assert advice.pool.block_size == 16
    assert advice.pool.tokens >= 200


def test_encoders_side_by_side_are_worth_it_for_many_pictures() -> None:
    """Undivided, the pictures of a request are encoded one after the other; split, several encoders share them."""
    album = Workload(pictures=(200,) * 6, rate=0.2, output_tokens=8, requests=100)
    advice = advise(album.asked(), 0.2, SPEEDS, 4096, devices=4)
    assert advice.is_worth, advice.sentence
    assert advice.best.deployment == Deployment(3, 1)


def test_answers_that_pictures_do_not_stop_are_worth_it() -> None:
    """Undivided, every picture stops the answers of all others."""
    long = Workload(pictures=(400,), rate=1.5, output_tokens=100, requests=150)
    advice = advise(long.asked(), 1.5, SPEEDS, 4096, devices=2)
    assert advice.undivided.outcome.latency(0.95) > 1.2 * advice.split.outcome.latency(0.95)


def test_idle_instances_are_not_worth_it() -> None:
    calm = Workload(pictures=(100,), rate=0.1, burstiness_cv=0.0, output_tokens=8, requests=50)
    speeds = msgspec.structs.replace(SPEEDS, handover=Curve(base=0.05), split_request=0.01)
    advice = advise(calm.asked(), 0.1, speeds, 4096)
    assert not advice.is_worth
    assert "Not worth it: split, the time to first token is 190 ms instead of 130 ms in the median" in advice.sentence


def test_at_most_five_splits_are_shown_the_best_of_them() -> None:
    advice = advise(BUSY.asked()[:20], BUSY.rate, SPEEDS, 4096, devices=12)
    splits = [one for one in advice.rows if one.deployment.is_split]
    assert len(splits) == 5
    assert max(one.capacity for one in splits) == pytest.approx(10 / 0.2)


def test_a_given_pool_is_played_and_its_resumes_are_told() -> None:
    advice = advise(asked(0.0, 1.0), 1.0, SPEEDS, 4096, block_size=16, devices=2, pool=Pool(1, 16))
    assert advice.split.outcome.resumes == 12
    assert "with the 16 tokens given there are 12 resumed transfers for 2 requests" in advice.pool_why
    assert advice.pool == Pool(7, 16)


def test_a_rate_that_nothing_carries_is_refused() -> None:
    with pytest.raises(WorkloadInvalid, match="--rate 1e\\+06"):
        advise(asked(0.0, 1e-6), 1e6, SPEEDS, 4096)


@settings(max_examples=25)
@given(st.integers(2, 6), st.floats(0.5, 30), st.sampled_from([None, 2.0]), st.integers(1, 3))
def test_the_best_of_each_kind_is_in_the_table(devices: int, rate: float, cores: float | None, pictures: int) -> None:
    speeds = msgspec.structs.replace(SPEEDS, cores=cores)
    work = Workload(pictures=(100,) * pictures, rate=rate, output_tokens=4, requests=20)
    advice = advise(work.asked(), rate, speeds, 4096, devices=devices)
    assert advice.undivided in advice.rows
    assert advice.split in advice.rows
    assert not any(one.order < advice.best.order for one in advice.rows if one.deployment.is_split is advice.is_worth)
    needed = play(work.asked(), advice.split.deployment, speeds, 4096, advice.pool)
    assert needed.resumes == 0, "the pool that is advised is enough"


@pytest.mark.parametrize(
    ("one", "devices", "words"),
    [
        (Asked(0.0, (100,), 100, 64), 64, "--requests 31250: too many to play through 76 times; give [1-9][0-9,]* at"),
        (Asked(0.0, (10**12,), 100, 1), 2, "a prompt of 1,000,000,000,100 tokens takes too many steps of batch_tokens"),
    ],
)
def test_plays_that_would_take_minutes_are_refused_before_they_begin(one: Asked, devices: int, words: str) -> None:
    with pytest.raises(WorkloadInvalid, match=words):
        advise([one] * 31_250, 1.0, SPEEDS, 1, devices=devices)


def test_as_many_requests_as_the_error_says_can_be_played() -> None:
    many, deployments = asked(*[0.0] * 100_000, output_tokens=20), arrangements(40)
    with pytest.raises(WorkloadInvalid) as refused:
        check_work(many, deployments, SPEEDS)
    most = int(str(refused.value.detail).partition("give ")[2].split()[0])
    check_work(many[:most], deployments, SPEEDS)
    with pytest.raises(WorkloadInvalid):
        check_work(many[: most + 1], deployments, SPEEDS)
