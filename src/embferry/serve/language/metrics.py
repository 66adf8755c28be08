"""Prometheus metrics of a language worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client.core import CounterMetricFamily

from embferry.engine.scheduler import Output
from embferry.kept.folder import KeptFolder
from embferry.serve.language.job import Job
from embferry.serve.worker.metrics import WorkerMetrics


class LanguageMetrics(WorkerMetrics):
    """The metrics of one worker.

    Args:
        states: returns the number of requests in each state; called at each scrape.
        pool: returns the number of blocks in each state; called at each scrape.
    """

    def __init__(self, states: Callable[[], Mapping[str, float]], pool: Callable[[], Mapping[str, float]]) -> None:
        super().__init__()
        counter, histogram = self.counter, self.histogram
        self._ended = counter("embferry_language_answers", "Finished answers", ["finish_reason"])
        self.failed = counter("embferry_language_errors", "Requests that ended with an error", ["code"])
        self.aborted = counter("embferry_language_aborted", "Requests aborted by their caller")
        self.ttft = histogram(
            "embferry_language_first_token_seconds", "Time from request to the first token of the answer"
        )
        last = "Time from request to the last token of the embedding"
        self._seconds = histogram("embferry_language_transfer_seconds", last)
        self._tokens = counter("embferry_language_transfer_tokens", "Tokens of received embeddings")
        self._kept = counter(
            "embferry_language_kept_tokens",
            "Tokens that a killed worker had received and that were not sent again",
        )
        self._bytes = counter("embferry_language_transfer_bytes", "Bytes of received embeddings", ["transport"])
        self._transfers = counter("embferry_language_transfers", "Transfers of embeddings", ["phase"])
        self._prompt = counter("embferry_language_prompt_tokens", "Tokens of answered prompts")
        self._completion = counter("embferry_language_completion_tokens", "Tokens of answers")
        self.reading("embferry_language_requests", "Requests by state", "state", states)
        blocks = "Blocks of the receive pool by state"
        self.reading("embferry_language_pool_blocks", blocks, "state", pool)

    def watch_kept(self, folder: KeptFolder | None) -> None:
        """Adds the counters of the folder for embeddings under way; None: there is none."""

        def dropped() -> dict[str, float]:
            return {} if folder is None else {reason: float(count) for reason, count in folder.dropped.items()}

        def unkept() -> dict[str, float]:
            return {"": 0.0 if folder is None else float(folder.unkept)}

        about = "Embeddings that killed workers had received in part, and that were dropped"
        self.reading("embferry_language_kept_dropped", about, "reason", dropped, CounterMetricFamily)
        about = "Embeddings received into ordinary memory because of an error or lack of room: a kill would lose them"
        self.reading("embferry_language_unkept", about, "", unkept, CounterMetricFamily)

    def transferred(self, job: Job) -> None:
        """Counts an embedding that has arrived completely."""
        transfer = job.transfer()
        if transfer is not None:
            self._seconds.observe(job.seconds_to("transferred") or 0.0)
            self._tokens.inc(transfer["total_tokens"])
            self._kept.inc(transfer.get("kept_tokens", 0))
            self._bytes.labels(transfer["transport"]).inc(transfer["bytes"])
            for phase in ("initial", "resumed"):
                self._transfers.labels(phase).inc(transfer[phase])

    def finished(self, output: Output) -> None:
        """Counts a finished answer."""
        self._ended.labels(output.finish_reason).inc()
        self._prompt.inc(output.usage.prompt_tokens)
        self._completion.inc(output.usage.completion_tokens)
