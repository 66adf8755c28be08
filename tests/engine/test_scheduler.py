"""The scheduler: requests take turns, and the arrival of embeddings does not change results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from embferry.engine.embedding import Embedding
from embferry.engine.errors import EmbeddingMismatch, QueueFull
from embferry.engine.sampling import SamplingParams
from embferry.engine.scheduler import EmbeddingSource, Output, Request, ResidentSource, Scheduler
from tests.engine.cases import CASES, Split
from tests.engine.tiny import picture, video

TOKENS = SamplingParams(max_tokens=6, ignore_eos=True)


class TransferError(Exception):
    pass


class Arriving:
    """A source whose tokens arrive in portions; it checks that no token is read too early or after its release.

    Tensors that were read are overwritten on release, as the next grant overwrites the blocks of a receive pool.
    """

    def __init__(self, embeddings: list[Embedding], arrivals: Iterator[int], fails_at: int | None = None) -> None:
        self._whole = ResidentSource(*embeddings)
        self._arrivals = arrivals
        self._fails_at = fails_at
        self.arrived = 0
        self.released = 0
        self.reads: list[tuple[str, int, int]] = []
        self._lent: list[torch.Tensor] = []

    @property
    def total_tokens(self) -> int:
        return self._whole.total_tokens

    def available_tokens(self) -> int:
        if self._fails_at is not None and self.arrived >= self._fails_at:
            raise TransferError("the encode worker is gone")
        return self.arrived

    def arrive(self) -> None:
        self.arrived = min(self.total_tokens, self.arrived + next(self._arrivals, 0))

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        assert self.released <= start < stop <= self.arrived
        self.reads.append((field, start, stop))
        self._lent.append(self._whole.read(field, start, stop).clone())
        return self._lent[-1]

    def release(self, upto: int) -> None:
        assert self.released <= upto <= self.arrived
        self.released = upto
        for tensor in self._lent:
            tensor.fill_(-1)
        self._lent.clear()


def endless(seed: int, most: int) -> Iterator[int]:
    generator = random.Random(seed)
    while True:
        yield generator.randint(0, most)


ARRIVALS: dict[str, Callable[[], Iterator[int]]] = {
    "at once": lambda: iter([10**6]),
    "one by one": lambda: endless(0, 1),
    "in bursts": lambda: endless(1, 30),
    "late": lambda: iter([0] * 20 + [10**6]),
}


def drive(scheduler: Scheduler, sources: Sequence[Arriving] = (), most: int = 2000) -> list[Output]:
    """Steps until all requests have ended, letting tokens arrive in between; returns all outputs."""
    outputs = []
    for _ in range(most):
        if not len(scheduler):
            return outputs
        outputs += scheduler.step()
        for source in sources:
            source.arrive()
    raise AssertionError(f"{len(scheduler)} requests have not ended after {most} steps")


def tokens_of(outputs: list[Output], request: str) -> list[int]:
    return [output.token for output in outputs if output.request_id == request and output.token is not None]


def last_of(outputs: list[Output], request: str) -> Output:
    ends = [output for output in outputs if output.request_id == request and output.finish_reason]
    assert len(ends) == 1
    assert [output for output in outputs if output.request_id == request][-1] is ends[0]
    return ends[0]


@pytest.fixture(scope="module")
def models(split) -> Split:
    return split("qwen3_vl").chunked(16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_arrival_does_not_change_results(split, family_name, dtype, arrival):
    """For every pattern of arrival, logits and tokens are those of the undivided model."""
    models = split(family_name, dtype).chunked(16)
    scheduler, sources, asked = Scheduler(models.language), [], {}
    logits: dict[str, list[torch.Tensor]] = {}
    for name, case in CASES.items():
        asked[name] = models.ask(case())
        source = Arriving(asked[name].embeddings, ARRIVALS[arrival]()) if asked[name].embeddings else None
        sources += [source] if source is not None else []
        scheduler.add(Request(name, asked[name].prompt, TOKENS, source))
        logits[name] = []
    outputs = []
    for _ in range(2000):
        if not len(scheduler):
            break
        running = dict(scheduler._running)
        stepped = scheduler.step()
        outputs += stepped
        for output in stepped:
            logits[output.request_id].append(running[output.request_id].sequences[0].logits)
        for source in sources:
            source.arrive()
    for name, request in asked.items():
        expected = models.undivided.run(request.prompt, request.prepared, TOKENS)
        assert tokens_of(outputs, name) == expected.tokens
        assert all(torch.equal(a, b) for a, b in zip(logits[name], expected.logits, strict=True))
        end = last_of(outputs, name)
        assert (end.finish_reason, end.error) == ("length", None)
        assert end.usage.completion_tokens == 6
        assert end.usage.visual_tokens == sum(item.num_tokens for item in request.prepared)
    assert all(source.released == source.total_tokens for source in sources)


def test_prefill_starts_before_the_whole_embedding_has_arrived(models):
    asked = models.ask(CASES["three images"]())
    source = Arriving(asked.embeddings, iter([20]))
    scheduler = Scheduler(models.language)
    scheduler.add(Request("a", asked.prompt, TOKENS, source))
    for _ in range(10):
        scheduler.step()
        source.arrive()
    assert 0 < source.released <= 20 < source.total_tokens
    assert not scheduler.runnable()
    source.arrived = source.total_tokens
    assert scheduler.runnable()
    assert len(tokens_of(drive(scheduler), "a")) == 6
    assert next(start for field, start, _ in source.reads if field == "fill_ids") == 0


def test_a_missing_embedding_does_not_hold_up_other_requests(models):
    """Three requests are complete and one waits for its embedding: each step gives each of the three one token."""
    scheduler = Scheduler(models.language)
    whole = [models.ask([]), models.ask([], "what is it?"), models.ask([], "and that?")]
    stuck = models.ask(CASES["one image"]())
    held = Arriving(stuck.embeddings, iter([]))
    scheduler.add(Request("stuck", stuck.prompt, TOKENS, held))
    for number, asked in enumerate(whole):
        scheduler.add(Request(str(number), asked.prompt, TOKENS))
    steps = [[output.request_id for output in scheduler.step()] for _ in range(8)]
    assert all(len(set(step)) == len(step) for step in steps), "no request moves twice in a step"
    assert [sum(number in step for step in steps) for number in "012"] == [6, 6, 6]
    assert "stuck" not in {request for step in steps for request in step}
    assert len(scheduler) == 1


def test_a_long_prompt_does_not_hold_up_other_requests(models):
    scheduler = Scheduler(models.language)
    long, short = models.ask([], "x " * 300), models.ask([])
    scheduler.add(Request("long", long.prompt, TOKENS))
    scheduler.add(Request("short", short.prompt, TOKENS))
    order = [output.request_id for output in drive(scheduler)]
    assert order == ["short"] * 6 + ["long"] * 6


@pytest.mark.parametrize("fails_at", [0, 10, 24])
def test_a_failing_source_ends_only_its_own_request(models, fails_at):
    scheduler = Scheduler(models.language)
    bad, good = models.ask(CASES["three images"]()), models.ask(CASES["one image"]())
    broken = Arriving(bad.embeddings, endless(0, 5), fails_at=fails_at)
    whole = Arriving(good.embeddings, endless(1, 5))
    scheduler.add(Request("bad", bad.prompt, TOKENS, broken))
    scheduler.add(Request("good", good.prompt, TOKENS, whole))
    outputs = drive(scheduler, [broken, whole])
    end = last_of(outputs, "bad")
    assert (end.finish_reason, end.token) == ("error", None)
    assert isinstance(end.error, TransferError)
    assert end.usage.completion_tokens == 0
    assert tokens_of(outputs, "good") == models.undivided.run(good.prompt, good.prepared, TOKENS).tokens
    assert last_of(outputs, "good").error is None


def test_a_failed_source_makes_the_scheduler_runnable(models):
    asked = models.ask(CASES["one image"]())
    source = Arriving(asked.embeddings, iter([]))
    scheduler = Scheduler(models.language)
    scheduler.add(Request("a", asked.prompt, TOKENS, source))
    for _ in range(5):
        scheduler.step()
    assert not scheduler.runnable()
    source._fails_at = 0
    assert scheduler.runnable()
    assert isinstance(last_of(scheduler.step(), "a").error, TransferError)


class Announced(Arriving):
    """A source whose length is not that of the prompt's media."""

    total_tokens = 3


def test_an_embedding_of_other_media_is_rejected(models):
    asked = models.ask([picture(1)])
    same_size, turned, moving = (
        models.ask([picture(2)]),
        models.ask([picture(1, 96, 32)]),
        models.ask([video(1, 2, 64, 64)]),
    )
    assert same_size.prompt.num_visual == asked.prompt.num_visual
    wrong: list[EmbeddingSource] = [ResidentSource(*other.embeddings) for other in (same_size, turned, moving)]
    for source in [*wrong, Announced(asked.embeddings, iter([]))]:
        scheduler = Scheduler(models.language)
        scheduler.add(Request("a", asked.prompt, TOKENS, source))
        assert isinstance(last_of(drive(scheduler), "a").error, EmbeddingMismatch)


def test_running_and_queued_requests_can_be_aborted(models):
    scheduler = Scheduler(models.language, max_running=1)
    asked = models.ask([])
    for name in "abc":
        scheduler.add(Request(name, asked.prompt, TOKENS))
    outputs = [output for _ in range(3) for output in scheduler.step()]
    assert scheduler.abort("a")
    assert scheduler.abort("c")
    assert not scheduler.abort("c")
    assert scheduler.runnable()
    outputs += drive(scheduler)
    assert last_of(outputs, "a").finish_reason == "abort"
    assert last_of(outputs, "a").usage.completion_tokens == len(tokens_of(outputs, "a")) > 0
    assert (last_of(outputs, "c").finish_reason, tokens_of(outputs, "c")) == ("abort", [])
    assert len(tokens_of(outputs, "b")) == 6


def test_limits_on_running_and_queued_requests(models):
    scheduler = Scheduler(models.language, max_running=2, max_queued=1)
    asked = models.ask([])
    for name in "abc":
        scheduler.add(Request(name, asked.prompt, TOKENS))
    assert (scheduler.num_running, scheduler.num_queued, len(scheduler)) == (2, 1, 3)
    with pytest.raises(QueueFull):
        scheduler.add(Request("d", asked.prompt, TOKENS))
    with pytest.raises(ValueError, match="not finished"):
        scheduler.add(Request("c", asked.prompt, TOKENS))
    seen = drive(scheduler)
    assert {output.request_id for output in seen} == set("abc")
    with pytest.raises(ValueError, match="no source"):
        scheduler.add(Request("e", models.ask([picture(1)]).prompt, TOKENS))


def test_a_client_waits_for_its_share_of_the_running_requests_however_many_others_have_sent(models):
    scheduler = Scheduler(models.language, max_running=2)
    asked = models.ask([])
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "b3"):
        scheduler.add(Request(name, asked.prompt, TOKENS, client=name[0]))
    ended = [output.request_id for output in drive(scheduler) if output.finish_reason]
    assert ended == ["a1", "a2", "a3", "b1", "a4", "b2", "b3"]


def test_outputs_carry_text_and_time_to_first_token(models):
    now = iter(range(100))
    scheduler = Scheduler(models.language, clock=lambda: float(next(now)))
    asked = models.ask(CASES["one image"]())
    scheduler.add(Request("a", asked.prompt, TOKENS, asked.source()))
    outputs = drive(scheduler)
    tokenizer = models.language.prompts.tokenizer
    text = tokenizer.decode(tokens_of(outputs, "a"), skip_special_tokens=True)
    assert "".join(output.text for output in outputs) == text
    assert [output.ttft for output in outputs] == [1.0, None, None, None, None, 1.0]


def test_a_stop_string_and_an_end_token_end_an_answer(models):
    asked = models.ask([])
    free = models.answer(asked.prompt, None, SamplingParams(max_tokens=40, ignore_eos=True))
    text = models.language.prompts.tokenizer.decode(free.tokens)
    at = next(
        at for at in range(3, len(text) - 1) if text[at : at + 2].isascii() and text.find(text[at : at + 2]) == at
    )
    stop = text[at : at + 2]
    scheduler = Scheduler(models.language)
    scheduler.add(Request("stop", asked.prompt, SamplingParams(max_tokens=40, stop=(stop,), ignore_eos=True)))
    outputs = drive(scheduler)
    assert last_of(outputs, "stop").finish_reason == "stop"
    assert "".join(output.text for output in outputs) == text[:at]
    ended = models.chunked(16).language
    ended.end_tokens = frozenset([free.tokens[2]])
    sequence = ended.start(asked.prompt, SamplingParams(max_tokens=40))
    while sequence.finish_reason is None:
        _ = ended.decode_step(sequence) if sequence.prefilled else ended.prefill_chunk(sequence)
    assert (sequence.finish_reason, sequence.tokens) == ("stop", free.tokens[: free.tokens.index(free.tokens[2]) + 1])


def test_choices_of_a_request_equal_requests_of_their_own(models):
    """The prefill runs once; each choice goes on from a copy of it, with the seed plus its number."""
    asked = models.ask([picture(1)])
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=8, ignore_eos=True)
    wanted = [models.answer(asked.prompt, asked.source(), replace(params, seed=8 + n)).tokens for n in range(3)]
    scheduler = Scheduler(models.language, max_running=4)
    scheduler.add(Request("a", asked.prompt, replace(params, n=3), asked.source()))
    outputs = drive(scheduler)
    assert [[one.token for one in outputs if one.choice == n] for n in range(3)] == wanted
    assert [one.finish_reason for one in outputs if one.finish_reason] == ["length"] * 3
    assert [one.is_last for one in outputs] == [False] * 17 + [True]
    assert outputs[-1].usage.completion_tokens == 18


def test_choices_count_as_running_sequences(models):
    asked = models.ask([])
    scheduler = Scheduler(models.language, max_running=3, max_queued=1)
    scheduler.add(Request("a", asked.prompt, replace(TOKENS, n=2)))
    scheduler.add(Request("b", asked.prompt, replace(TOKENS, n=2)))
    assert (scheduler.num_running, scheduler.num_queued) == (1, 1)
    with pytest.raises(QueueFull):
        scheduler.add(Request("c", asked.prompt, replace(TOKENS, n=2)))
    assert {output.request_id for output in drive(scheduler)} == {"a", "b"}
    scheduler.add(Request("d", asked.prompt, replace(TOKENS, n=5)))  # alone, it may be larger
    assert {output.choice for output in drive(scheduler)} == set(range(5))


def test_what_ends_an_answer(models):
    """Stop tokens and stop strings, with and without their text, and not before the least number of tokens."""
    asked = models.ask([picture(1)])
    free = models.answer(asked.prompt, asked.source(), SamplingParams(max_tokens=20, ignore_eos=True)).tokens

    def run(**fields):
        scheduler = Scheduler(models.language)
        params = SamplingParams(max_tokens=20, ignore_eos=True, **fields)
        scheduler.add(Request("a", asked.prompt, params, asked.source()))
        outputs = drive(scheduler)
        return tokens_of(outputs, "a"), "".join(output.text for output in outputs), outputs[-1].finish_reason

    _, text, reason = run()
    assert reason == "length"
    token = free[2]
    first = free.index(token) + 1
    tokens, before, reason = run(stop_token_ids=frozenset({token}))
    assert (tokens, reason) == (free[:first], "stop")
    _, with_stop, _ = run(stop_token_ids=frozenset({token}), include_stop=True)
    assert with_stop.startswith(before)
    assert text.startswith(with_stop)
    stop = text[3:5]
    assert run(stop=(stop,))[1] == text[: text.find(stop)]
    assert run(stop=(stop,), include_stop=True)[1] == text[: text.find(stop)] + stop
    assert len(run(stop=(stop,), min_tokens=15)[0]) >= 15


def test_control_tokens_may_be_part_of_the_text(models):
    asked = models.ask([])
    end = models.language.prompts.tokenizer.eos_token_id
    biased = {"max_tokens": 2, "ignore_eos": True, "logit_bias": ((end, 100.0),)}
    for skip, length in ((True, 0), (False, 2)):
        scheduler = Scheduler(models.language)
        scheduler.add(Request("a", asked.prompt, SamplingParams(**biased, skip_special_tokens=skip)))
        text = "".join(output.text for output in drive(scheduler))
        assert text == models.language.prompts.text_of([end]) * length
