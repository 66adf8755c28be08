"""Prometheus metrics of a language worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

from embferry.engine.scheduler import Output
from embferry.serve.language.job import Job
from embferry.serve.worker.metrics import SECONDS, Readings


class LanguageMetrics:
    """The metrics of one worker.

    Args:
        states: returns the number of requests in each state; called at each scrape.
        pool: returns the number of blocks in each state; called at each scrape.
    """

    def __init__(self, states: Callable[[], Mapping[str, float]], pool: Callable[[], Mapping[str, float]]) -> None:
        self.registry = registry = CollectorRegistry()
        self._ended = Counter("embferry_generate", "Finished answers", ["finish_reason"], registry=registry)
        self.failed = Counter(
            "embferry_generate_errors", "Requests that ended with an error", ["code"], registry=registry
        )
        self.aborted = Counter("embferry_generate_aborted", "Requests aborted by their caller", registry=registry)
        self.ttft = Histogram(
            "embferry_ttft_seconds",
            "Time from request to the first token of the answer",
            buckets=SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "embferry_transfer_seconds",
            "Time from request to the last token of the embedding",
            buckets=SECONDS,
            registry=registry,
        )
        self._tokens = Counter("embferry_transfer_tokens", "Tokens of received embeddings", registry=registry)
        self._bytes = Counter(
            "embferry_transfer_bytes", "Bytes of received embeddings", ["transport"], registry=registry
        )
        self._transfers = Counter("embferry_transfers", "Transfers of embeddings", ["phase"], registry=registry)
        self._prompt = Counter("embferry_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self._completion = Counter("embferry_completion_tokens", "Tokens of answers", registry=registry)
        registry.register(Readings("embferry_requests_by_state", "Requests by state", "state", states))
        registry.register(Readings("embferry_pool_blocks", "Blocks of the receive pool by state", "state", pool))

    def transferred(self, job: Job) -> None:
        """Counts an embedding that has arrived completely."""
        transfer = job.transfer()
        if transfer is not None:
            self._seconds.observe(job.seconds_to("transferred") or 0.0)
            self._tokens.inc(transfer["total_tokens"])
            self._bytes.labels(transfer["transport"]).inc(transfer["bytes"])
            for phase in ("initial", "resumed"):
                self._transfers.labels(phase).inc(transfer[phase])

    def finished(self, output: Output) -> None:
        """Counts a finished answer."""
        self._ended.labels(output.finish_reason).inc()
        self._prompt.inc(output.usage.prompt_tokens)
        self._completion.inc(output.usage.completion_tokens)
