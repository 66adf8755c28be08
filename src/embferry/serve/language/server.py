"""``embferry language``: a language worker as a process."""

from __future__ import annotations

from embferry.engine.language import LanguageModel
from embferry.models import model_path
from embferry.protocol.layout import Geometry
from embferry.serve.config import Settings
from embferry.serve.language.app import build
from embferry.serve.language.service import LanguageService
from embferry.serve.worker.process import Report, open_port, serve_worker, unreported
from embferry.serve.worker.transfers import DTYPES, language_timeouts, layout_of
from embferry.serve.worker.transports import make_transports
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transports.contract import Transport


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the language model and serves until SIGINT or SIGTERM.

    Args:
        report: told once, when the worker answers.
    """
    listener = open_port(settings, settings.language.port)
    transports = make_transports(settings)  # first: what is wrong with them need not wait for the model
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
    manager = ReceiveManager(geometry, transports, settings=language_timeouts(settings))
    return LanguageService(model, manager, settings)
