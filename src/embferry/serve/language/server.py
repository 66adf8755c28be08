"""``embferry language``: a language worker as a process."""

from __future__ import annotations

from embferry.disaggregation.base.conn_multimodal import Transport
from embferry.disaggregation.common.conn_multimodal import EmbeddingReceiveManager
from embferry.disaggregation.protocol.layout import Geometry
from embferry.engine.language import LanguageModel
from embferry.models import model_path
from embferry.serve.config import Settings
from embferry.serve.http.serving import Report, unreported
from embferry.serve.language.app import build
from embferry.serve.language.service import LanguageService
from embferry.serve.worker.process import open_port, serve_worker
from embferry.serve.worker.roads import roads
from embferry.serve.worker.transfers import DTYPES, language_timeouts, layout_of


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the language model and serves until SIGINT or SIGTERM.

    Args:
        report: told once, when the worker answers.
    """
    listener = open_port(settings, settings.language.port)
    transports = roads(settings)  # first: what is wrong with them need not wait for the model
    model = load(settings)
    service = service_of(model, settings, transports)
    serve_worker(build(service), service, listener, settings, "language", "", report)


def load(settings: Settings) -> LanguageModel:
    """
    Raises:
        UnsupportedModel, CheckpointError.
    """
    return LanguageModel.load(
        model_path(settings.model),
        DTYPES[settings.dtype],
        threads=settings.threads,
        prefill_chunk_tokens=settings.language.prefill_chunk_tokens,
    )


def service_of(model: LanguageModel, settings: Settings, transports: list[Transport]) -> LanguageService:
    """A running service, to be closed by the caller."""
    geometry = Geometry(layout_of(model.fields), settings.transfer.num_blocks, settings.transfer.block_size)
    manager = EmbeddingReceiveManager(geometry, transports, settings=language_timeouts(settings))
    return LanguageService(model, manager, settings)
