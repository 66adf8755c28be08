"""Requests that are played through deployments, with times that can be computed by hand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.clock import Clock
from embferry.plan.curve import Curve
from embferry.plan.deployment import Deployment
from embferry.plan.engine import Engine, Prompt
from embferry.plan.outcome import Outcome
from embferry.plan.pool import Pool
from embferry.plan.simulation import play, plays
from embferry.plan.speeds import Speeds

from .examples import SPEEDS, asked

WHOLE, SPLIT = Deployment(0, 1), Deployment(1, 1)


def times(outcome: Outcome) -> list[tuple[float, float]]:
    """Returns the times to the first token and to the last, of each request."""
    return [(pytest.approx(one.first - one.began), pytest.approx(one.ended - one.began)) for one in outcome.requests]


def test_one_request_takes_the_sum_of_its_stages() -> None:
    speeds = msgspec.structs.replace(SPEEDS, request=0.005, prepare=Curve(base=0.02))
    outcome = play(asked(0.0, output_tokens=3), WHOLE, speeds)
    # front end 0.005 + 0.02, then one step: 0.01 + encode 0.1 + prefill 0.02; two more steps
    assert times(outcome) == [(0.155, 0.175)]


def test_split_adds_the_router_and_the_handover_and_saves_what_overlaps() -> None:
    speeds = msgspec.structs.replace(
        SPEEDS, request=0.005, prepare=Curve(base=0.02), split_request=0.003, handover=Curve(each=0.0001)
    )
    outcome = play(asked(0.0, output_tokens=3), SPLIT, speeds)
    # router 0.003, picture 0.02 + 0.1 while the other front end takes 0.005, handover 0.01, step 0.01 + prefill 0.02
    assert times(outcome) == [(0.163, 0.183)]


def test_tokens_that_go_through_the_router_take_its_steps() -> None:
    speeds = msgspec.structs.replace(SPEEDS, split_step=Curve(base=0.02))
    assert times(play(asked(0.0, output_tokens=3), SPLIT, speeds)) == [(0.1 + 0.02 + 0.02, 0.1 + 0.02 + 3 * 0.02)]
    assert times(play(asked(0.0, output_tokens=3), WHOLE, speeds)) == [(0.13, 0.15)]


def test_an_encoder_works_while_the_language_model_answers() -> None:
    many = asked(*[0.0] * 20, output_tokens=1)
    whole, split = play(many, WHOLE, SPEEDS), play(many, SPLIT, SPEEDS)
    assert whole.duration > 20 * 0.12, "one instance does everything in turn"
    assert split.duration == pytest.approx(20 * 0.1 + 0.03), "prefill of all but the last is beside the encoder"
    assert split.encoder_busy == pytest.approx(2.0 / 2.03)


def test_a_step_prefills_what_waits_and_stops_at_its_budget() -> None:
    speeds = msgspec.structs.replace(SPEEDS, encode=Curve(each=1e-9), batch_tokens=450)
    outcome = play(asked(0.0, 0.0, 0.0, 0.0), WHOLE, speeds)
    # The first arrives alone; two of the other three, of 200 tokens each, fit into the next step.
    assert [one.first for one in outcome.requests] == pytest.approx([0.03, 0.08, 0.08, 0.11], abs=1e-6)


def test_a_long_prompt_is_prefilled_in_chunks_beside_the_answers() -> None:
    clock = Clock()
    engine = Engine(clock, msgspec.structs.replace(SPEEDS, batch_tokens=100))
    firsts: list[float] = []
    ends: list[float] = []
    for tokens, output in ((50, 5), (250, 1)):
        engine.add(Prompt(tokens, output, 0.0, lambda: firsts.append(clock.now), lambda: ends.append(clock.now)))
    clock.run()
    # 0.015; then steps of 0.01 with one answer and 99 tokens of the prompt, twice, and with 52 of it
    assert firsts == pytest.approx([0.015, 0.015 + 3 * 0.01 + 0.025])
    assert engine.requests == 0


def test_no_more_requests_run_than_the_batch_has_room_for() -> None:
    speeds = msgspec.structs.replace(SPEEDS, batch_requests=1, encode=Curve(each=1e-9))
    outcome = play(asked(0.0, 0.0, output_tokens=2), WHOLE, speeds)
    assert times(outcome)[1] == (pytest.approx(0.07, abs=1e-6), pytest.approx(0.08, abs=1e-6))


def test_a_pool_smaller_than_the_embedding_means_resumes() -> None:
    pool = Pool(blocks=2, block_size=16)
    outcome = play(asked(0.0), SPLIT, msgspec.structs.replace(SPEEDS, resume=0.5), pool=pool)
    assert outcome.resumes == 3, "100 tokens in four times 32"
    assert times(outcome)[0][0] == pytest.approx(0.1 + 1.5 + 0.03)
    assert play(asked(0.0), SPLIT, SPEEDS, pool=Pool(7, 16)).resumes == 0


def test_the_bandwidth_is_that_of_the_bytes() -> None:
    speeds = msgspec.structs.replace(SPEEDS, bandwidth=1e6)
    assert times(play(asked(0.0), SPLIT, speeds, token_bytes=4096))[0][0] == pytest.approx(0.13 + 0.4096)


def test_transfers_to_one_language_instance_share_its_link() -> None:
    """Two pictures are encoded at once; over one link, each transfer takes twice as long."""
    speeds = msgspec.structs.replace(SPEEDS, bandwidth=1e6, slack=0, prefill=Curve(each=1e-9))
    together = play(asked(0.0, 0.0), Deployment(2, 1), speeds, token_bytes=4096, draws=1)
    arrived = 0.1 + 2 * 0.4096  # both; one of them waits for the step of the other
    assert [one.first for one in together.requests] == pytest.approx([arrived + 0.01, arrived + 0.02], abs=1e-5)
    apart = play(asked(0.0, 0.0), Deployment(2, 2), speeds, token_bytes=4096, draws=1)
    assert [one.first for one in apart.requests] == pytest.approx([0.1 + 0.4096 + 0.01] * 2, abs=1e-5)


def test_requests_that_wait_for_others_to_end_have_not_begun() -> None:
    outcome = play(asked(0.0, 0.0, 0.0), WHOLE, SPEEDS, concurrency=1)
    assert [one.began for one in outcome.requests] == pytest.approx([0.0, 0.13, 0.26])
    assert outcome.throughput == pytest.approx(3 / 0.39)


def test_instances_take_turns() -> None:
    outcome = play(asked(0.0, 0.0, 0.0), Deployment(0, 3), SPEEDS)
    assert outcome.duration == pytest.approx(0.13)


def test_pictures_of_a_busy_home_go_to_the_idlest_encoder() -> None:
    speeds = msgspec.structs.replace(SPEEDS, slack=0, prefill=Curve(each=1e-9))
    for outcome in plays(asked(*[0.0] * 8), Deployment(4, 1), speeds):
        assert outcome.duration == pytest.approx(0.22, abs=1e-3), "two each, and two steps"


def test_where_pictures_are_at_home_is_drawn_several_times() -> None:
    many = asked(*[0.0] * 8)
    drawn = plays(many, Deployment(4, 1), msgspec.structs.replace(SPEEDS, slack=8))
    assert len({outcome.duration for outcome in drawn}) > 1
    together = play(many, Deployment(4, 1), msgspec.structs.replace(SPEEDS, slack=8))
    assert len(together.requests) == 8 * len(drawn)
    rates = [outcome.throughput for outcome in drawn]
    assert min(rates) < together.throughput < max(rates)
    assert len(plays(many, SPLIT, SPEEDS)) == len(plays(many, WHOLE, SPEEDS)) == 1, "there is nothing to draw"


def test_cores_that_all_share_make_splitting_pointless() -> None:
    shared = msgspec.structs.replace(SPEEDS, cores=1.0)
    many = asked(*[0.0] * 20)
    whole, split = play(many, WHOLE, shared), play(many, SPLIT, shared)
    assert split.duration >= whole.duration * 0.99
    assert play(many, SPLIT, SPEEDS).duration < split.duration


def test_the_same_input_gives_the_same_outcome() -> None:
    many = asked(*[0.01 * n for n in range(50)], output_tokens=8)
    assert play(many, Deployment(3, 2), SPEEDS) == play(many, Deployment(3, 2), SPEEDS)


@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=15),
    st.integers(0, 3),
    st.integers(1, 3),
    st.sampled_from([None, 1.0, 2.5]),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_every_request_ends_once_and_waits_at_least_for_its_own_work(
    at: list[float], encoders: int, languages: int, cores: float | None, output: int, concurrency: int
) -> None:
    speeds = msgspec.structs.replace(SPEEDS, cores=cores)
    requests = asked(*sorted(at), pictures=(40, 100), output_tokens=output)
    for outcome in plays(requests, Deployment(encoders, languages), speeds, 0, Pool(1, 8), concurrency):
        assert len(outcome.requests) == len(requests)
        for one in outcome.requests:
            assert one.first - one.began >= 0.1 + 0.024 + 0.01 - 1e-9
            assert one.ended - one.first >= (output - 1) * 0.01 - 1e-9
        assert 0 <= outcome.encoder_busy <= 1
        assert 0 <= outcome.language_busy <= 1


@given(st.integers(1, 4), st.floats(1.0, 4.0))
def test_slower_stages_never_make_a_lone_request_faster(pictures: int, factor: float) -> None:
    slower = Speeds(encode=SPEEDS.encode.scaled(factor), prefill=SPEEDS.prefill.scaled(factor), step=SPEEDS.step)
    for deployment in (WHOLE, SPLIT):
        fast = play(asked(0.0, pictures=(100,) * pictures), deployment, SPEEDS)
        assert play(asked(0.0, pictures=(100,) * pictures), deployment, slower).ttft() >= fast.ttft()
