"""Which deployment to take, and whether splitting is worth it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embferry.plan.advice import Advice, Row, advise, carried, fewest, verdict
from embferry.plan.capacity import Demands
from embferry.plan.curve import Curve
from embferry.plan.deployment import Deployment, arrangements
from embferry.plan.errors import RateNotCarried
from embferry.plan.outcome import Ended, Outcome
from embferry.plan.pool import Pool
from embferry.plan.simulation import play
from embferry.plan.workload import Workload

from .examples import SPEEDS, asked

BUSY = Workload(pictures=(100, 100), rate=6.0, burstiness_cv=3.0, output_tokens=8, requests=100)


def row(deployment: Deployment, *ttfts: float, capacity: float = 10.0, rate: float = 1.0) -> Row:
    """Returns a row with these times to first token."""
    return Row(deployment, capacity, Outcome(requests=[Ended(0.0, t, 1 + t / 100) for t in ttfts], duration=9.0), rate)


def outcomes(advice: Advice) -> tuple[Outcome, Outcome]:
    """Returns what comes of the requests, undivided and split."""
    assert advice.undivided.outcome is not None
    assert advice.split.outcome is not None
    return advice.undivided.outcome, advice.split.outcome


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
    undivided, split = outcomes(advice)
    assert undivided.latency(0.95) > 1.2 * split.latency(0.95)


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
    assert outcomes(advice)[1].resumes == 12
    assert "with the 16 tokens given there are 12 resumed transfers for 2 requests" in advice.pool_why
    assert advice.pool == Pool(7, 16)


@pytest.mark.parametrize(
    ("devices", "cores", "words"),
    [
        # A request takes 0.1 s of an encoder, 0.02 s of a language model: 0.12 s undivided.
        (None, None, "--rate 1000: 64 devices do not carry it; it takes 150 .undivided, 150 instances. by the demand"),
        (3, None, "no arrangement of 3 devices carries it. The most is 25 requests/s .undivided, 3 instances., where "
         "the language model is the slowest stage. By the demand law it takes 150 devices .undivided, 150"),
        (None, 2.0, "no arrangement of 3 instances carries it.* it takes 150 cores, and 150 instances"),
    ],
)  # fmt: skip
def test_a_rate_that_nothing_carries_is_refused_with_what_it_takes(
    devices: int | None, cores: float | None, words: str
) -> None:
    speeds = msgspec.structs.replace(SPEEDS, cores=cores)
    with pytest.raises(RateNotCarried, match=words):
        advise(asked(0.0, 1e-3), 1000.0, speeds, 4096, devices=devices)


def test_too_narrow_a_link_makes_a_split_carry_less() -> None:
    many, speeds = asked(*[0.25 * n for n in range(40)]), msgspec.structs.replace(SPEEDS, bandwidth=1e6)
    advice = advise(many, 4.0, speeds, 4096, devices=2)
    assert (advice.split.capacity, advice.split.outcome) == (pytest.approx(1e6 / 409_600), None)
    assert advice.sentence.startswith("Not worth it: undivided, 2 instances carry up to 16.7 requests/s, 1 encoder")
    assert advise(many, 4.0, SPEEDS, 4096, devices=2).split.capacity == pytest.approx(10)


@settings(max_examples=25)
@given(st.integers(2, 6), st.floats(0.5, 30), st.sampled_from([None, 2.0]), st.integers(1, 3))
def test_the_best_of_each_kind_is_in_the_table(devices: int, rate: float, cores: float | None, pictures: int) -> None:
    speeds = msgspec.structs.replace(SPEEDS, cores=cores)
    work = Workload(pictures=(100,) * pictures, rate=rate, output_tokens=4, requests=20)
    try:
        advice = advise(work.asked(), rate, speeds, 4096, devices=devices)
    except RateNotCarried:
        for one in arrangements(devices, shared=cores is not None):
            assert rate > carried(work.asked(), one, speeds, Demands.of(work.asked(), speeds, is_split=one.is_split))
        return
    assert advice.best.carries
    assert all((one.outcome is not None) is one.carries for one in advice.rows)
    assert advice.undivided in advice.rows
    assert advice.split in advice.rows
    assert not any(one.order < advice.best.order for one in advice.rows if one.deployment.is_split is advice.is_worth)
    if advice.split.carries:
        needed = play(work.asked(), advice.split.deployment, speeds, 4096, advice.pool)
        assert needed.resumes == 0, "the pool that is advised is enough"
