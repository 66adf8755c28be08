"""Measures the speeds of a running deployment over HTTP: the requests of :mod:`.probes`, sent and timed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import msgspec

from embferry.bench.serving import counters, documents
from embferry.bench.serving.client import Endpoint, send_all
from embferry.bench.serving.endpoint import first_model
from embferry.bench.serving.results import Run, Sample
from embferry.bench.serving.workload import Picture, Request, nearest_grid
from embferry.bench.serving.workload import grid as sides_of

from . import probes
from .deployment import MOST_DEVICES, Deployment
from .errors import MeasuringFailed
from .model import Model
from .probes import ANSWER, BURST_ANSWER, PICTURE_TOKENS, TOGETHER, WORDS, Burst, Step, Text, Times
from .workload import Asked

REPEATS = 5
"""How often each request, and eight at once, are sent; the median counts."""
GAP_S = 0.3
"""Before each request that is sent alone, as in a deployment that has little to do: processes that wait fall asleep."""
TIMEOUT_S = 120.0
"""For one request."""
ACTIVITY_TIMEOUT_S = 10.0
MOST_PROMPT_TOKENS = 1 << 20
"""Tokens of a prompt that a server may tell: those that are sent have a few thousand."""
PREFILL, FIRST = "vllm:request_prefill_time_seconds_sum", "vllm:time_to_first_token_seconds_count"
Told = Callable[[str], None]


class Worker(msgspec.Struct):
    """An instance behind a router."""

    role: str = ""


class Watched(msgspec.Struct):
    """A request at a router: the name, the beginning and the end of each of its phases."""

    phases: list[tuple[str, float, float | None]] = []


class Activity(msgspec.Struct):
    """The part of a router's ``/activity`` that is read here."""

    workers: list[Worker]
    requests: list[Watched] = []


class Target:
    """One deployment that is measured.

    Args:
        url: Without ``/v1``.
        model: Says which pictures have how many tokens.
        name: The model's name at the endpoint; empty: the first that it lists.
        extra: Fields of the requests' bodies beyond OpenAI's.
        api_key: Of the endpoint.
        told: Called with what is being done.
        repeats: How often each request is sent; the median counts.
        wait: Called with seconds to wait.

    Raises:
        MeasuringFailed: nothing answers there.
    """

    def __init__(
        self,
        url: str,
        model: Model,
        name: str,
        extra: dict[str, Any],
        api_key: str,
        told: Told,
        repeats: int = REPEATS,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._endpoint = Endpoint(url.rstrip("/"), name, 1, TIMEOUT_S, 0, extra, api_key)
        self._model, self._told, self._repeats, self._wait = model, told, repeats, wait
        if not name:
            try:
                self._endpoint = msgspec.structs.replace(self._endpoint, model=first_model(self._endpoint))
            except ValueError as error:
                raise MeasuringFailed(str(error)) from error
        self._activity = self._ask_activity()

    @property
    def deployment(self) -> Deployment:
        """The instances behind a router; one undivided instance if it is no router."""
        if self._activity is None:
            return Deployment(0, 1)
        roles = [worker.role for worker in self._activity.workers]
        encoders, languages = roles.count("encode"), sum(role != "encode" for role in roles)
        if not encoders or not languages:
            raise MeasuringFailed(f"the router at {self._endpoint.url} has no encoder or no language instance")
        if len(roles) > MOST_DEVICES:
            raise MeasuringFailed(f"the router at {self._endpoint.url} has {len(roles)} instances; measure fewer")
        return Deployment(encoders, languages)

    def times(self) -> Times:
        """Measures everything.

        Raises:
            MeasuringFailed: a request was not answered.
        """
        deployment = self.deployment
        self._sent([()], "warming", 4, words=8)
        self._sent([(self._picture(256),)] * 2, "warming", 4, at_once=False)
        texts = [self._text(words) for words in WORDS]
        pictures = [self._one_picture(tokens) for tokens in self._sizes()]
        steps = [self._step(1), self._step(TOGETHER)]
        bursts = [self._burst() for _ in range(self._repeats)]
        middle = sorted(bursts, key=lambda one: one.latency)[self._repeats // 2]
        middle = msgspec.structs.replace(middle, noise=probes.noise([one.latency for one in bursts]))
        return Times(deployment, tuple(texts), tuple(pictures), tuple(steps), (middle,))

    def _sizes(self) -> list[int]:
        """Returns the visual tokens of the pictures to send; the sides of each are those of a rectangle of tokens."""
        rule = self._model.rule
        if rule is None:
            raise MeasuringFailed(
                f"{self._model.name} has no rule for the tokens of a picture, so none can be drawn to measure with"
            )
        largest = max(1, rule.max_pixels // rule.factor**2)
        fitting = [nearest_grid(one) for one in probes.sizes(PICTURE_TOKENS, largest)]
        return sorted({self._tokens(one) for one in fitting})

    def _picture(self, tokens: int) -> Picture:
        """Returns a picture that no cache has seen."""
        assert self._model.rule is not None
        short, long = sides_of(nearest_grid(tokens)) or (8, 8)
        factor = self._model.rule.factor
        return Picture((secrets.randbits(48), tokens), long * factor, short * factor, self._tokens(tokens))

    def _tokens(self, tokens: int) -> int:
        assert self._model.rule is not None
        short, long = sides_of(nearest_grid(tokens)) or (8, 8)
        factor = self._model.rule.factor
        return self._model.tokens(long * factor, short * factor)

    def _text(self, words: int) -> Text:
        samples, engine, _ = self._each([() for _ in range(self._repeats)], f"prompts of {words} words", words=words)
        return Text(round(mean(_prompt(one) for one in samples)), _ttft(samples), engine, _noise(samples))

    def _one_picture(self, tokens: int) -> probes.Picture:
        wanted = [(self._picture(tokens),) for _ in range(self._repeats)]
        samples, engine, transfer = self._each(wanted, f"pictures of {wanted[0][0].tokens} tokens")
        prompt = round(mean(_prompt(one) for one in samples))
        return probes.Picture(wanted[0][0].tokens, prompt, _ttft(samples), engine, transfer, _noise(samples))

    def _step(self, together: int) -> Step:
        samples = self._sent([()] * together, f"answers, {together} at once", ANSWER, words=8)
        samples += self._sent([()] * together, f"answers, {together} at once", ANSWER, words=8)
        seconds = [one.tpot for one in samples if one.tpot is not None]
        if not seconds:
            raise MeasuringFailed("the answers have one token, so a step cannot be timed; see --extra")
        return Step(together, median(seconds))

    def _burst(self) -> Burst:
        tokens = self._sizes()[len(self._sizes()) // 2]
        wanted = [(self._picture(tokens),) for _ in range(TOGETHER)]
        samples = self._sent(wanted, f"{TOGETHER} pictures at once", BURST_ANSWER)
        asked = tuple(
            Asked(0.0, (wanted[0][0].tokens,), max(1, _prompt(one) - wanted[0][0].tokens), max(1, one.output_tokens))
            for one in samples
        )
        return Burst(asked, mean(one.ttft or 0.0 for one in samples), mean(one.latency for one in samples))

    def _each(
        self, pictures: Sequence[tuple[Picture, ...]], what: str, *, words: int = 0
    ) -> tuple[list[Sample], float | None, float | None]:
        """Sends requests one at a time. Returns also the mean seconds in an engine, and of a transfer, if told."""
        metrics = [f"{self._endpoint.url}/metrics"] if self._activity is None else []
        before = counters.read(metrics)
        samples = []
        for one in pictures:
            self._wait(GAP_S)
            samples += self._sent([one], what, 1, words=words)
        engine = None
        for earlier, now in zip(before, counters.read(metrics), strict=True):
            count = (now or {}).get(FIRST, 0.0) - (earlier or {}).get(FIRST, 0.0)
            if now is not None and PREFILL in now and count == len(samples):
                found = (now[PREFILL] - (earlier or {}).get(PREFILL, 0.0)) / count
                engine = found if 0 <= found < TIMEOUT_S else None
        return samples, engine, self._transfer(len(samples)) if any(pictures) else None

    def _transfer(self, latest: int) -> float | None:
        """Returns the median seconds of the transfers of the latest requests, as the router tells them."""
        told = self._ask_activity() if self._activity is not None else None
        found = []
        for request in told.requests[-latest:] if told is not None else ():
            spans = [end - begin for name, begin, end in request.phases if name == "transfer" and end is not None]
            found += [sum(spans)] if spans else []
        return median(found) if found else None

    def _sent(
        self,
        pictures: Sequence[tuple[Picture, ...]],
        what: str,
        max_tokens: int,
        *,
        words: int = 0,
        at_once: bool = True,
    ) -> list[Sample]:
        """Sends requests, each with a text of its own.

        Raises:
            MeasuringFailed: one was not answered.
        """
        self._told(what)
        text = " ".join([secrets.token_hex(4), *(["word"] * words)])
        endpoint = msgspec.structs.replace(
            self._endpoint, max_tokens=max_tokens, question=text, concurrency=0 if at_once else 1
        )
        run = Run(endpoint.url, what)
        send_all(endpoint, [Request(number, 0.0, one) for number, one in enumerate(pictures)], run)
        for sample in run.samples:
            if sample.error or sample.ttft is None:
                raise MeasuringFailed(f"{endpoint.url} does not answer ({what}): {sample.error or 'no token'}")
            if sample.output_tokens > max_tokens:
                raise MeasuringFailed(
                    f"{endpoint.url} says that an answer of at most {max_tokens} tokens has {sample.output_tokens:,}"
                )
        return run.samples

    def _ask_activity(self) -> Activity | None:
        """Returns what a router tells; None if it is no router."""
        where = f"{self._endpoint.url}/activity"
        try:
            return msgspec.json.decode(documents.read(where, ACTIVITY_TIMEOUT_S, self._endpoint.headers), type=Activity)
        except (OSError, ValueError, RecursionError):
            return None


def _prompt(sample: Sample) -> int:
    if sample.prompt_tokens is None:
        raise MeasuringFailed("the server does not say how many tokens a prompt has (stream_options.include_usage)")
    if sample.prompt_tokens > MOST_PROMPT_TOKENS:
        raise MeasuringFailed(f"the server says that a prompt has {sample.prompt_tokens:,} tokens")
    return sample.prompt_tokens


def _ttft(samples: Sequence[Sample]) -> float:
    return median(one.ttft for one in samples if one.ttft is not None)


def _noise(samples: Sequence[Sample]) -> float:
    return probes.noise([one.ttft for one in samples if one.ttft is not None])
