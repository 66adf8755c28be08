"""Numbers of a language worker, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

from embferry.engine.scheduler import Output
from embferry.serve.language.job import Job
from embferry.serve.worker.metrics import SECONDS, Readings


class LanguageMetrics:
    """``states``: requests by what they wait for; ``pool``: blocks by who has them. Asked for at each scrape."""

    def __init__(self, states: Callable[[], Mapping[str, float]], pool: Callable[[], Mapping[str, float]]) -> None:
        self.registry = registry = CollectorRegistry()
        self._ended = Counter("embferry_generate", "Answers finished", ["finish_reason"], registry=registry)
        self.failed = Counter(
            "embferry_generate_errors", "Requests that ended with an error", ["code"], registry=registry
        )
        self.aborted = Counter("embferry_generate_aborted", "Requests whose caller gave them up", registry=registry)
        self.ttft = Histogram(
            "embferry_ttft_seconds", "From request to first token of the answer", buckets=SECONDS, registry=registry
        )
        self._seconds = Histogram(
            "embferry_transfer_seconds",
            "From request to the last token of the embedding",
            buckets=SECONDS,
            registry=registry,
        )
        self._tokens = Counter("embferry_transfer_tokens", "Tokens of embeddings received", registry=registry)
        self._bytes = Counter(
            "embferry_transfer_bytes", "Bytes of embeddings received", ["transport"], registry=registry
        )
        self._transfers = Counter("embferry_transfers", "Transfers of embeddings", ["phase"], registry=registry)
        self._prompt = Counter("embferry_prompt_tokens", "Tokens of prompts answered", registry=registry)
        self._completion = Counter("embferry_completion_tokens", "Tokens of answers", registry=registry)
        registry.register(Readings("embferry_requests_by_state", "Requests by what they wait for", "state", states))
        registry.register(Readings("embferry_pool_blocks", "Blocks of the receive pool", "state", pool))

    def transferred(self, job: Job) -> None:
        """An embedding is whole."""
        told = job.transfer()
        if told is not None:
            self._seconds.observe(job.since("submitted", "transferred") or 0.0)
            self._tokens.inc(told["total_tokens"])
            self._bytes.labels(told["transport"]).inc(told["bytes"])
            for phase in ("initial", "resumed"):
                self._transfers.labels(phase).inc(told[phase])

    def finished(self, job: Job, output: Output) -> None:
        self._ended.labels(output.finish_reason).inc()
        self._prompt.inc(output.usage.prompt_tokens)
        self._completion.inc(output.usage.completion_tokens)
