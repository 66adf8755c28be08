"""``embferry language``: the process of a language worker."""

from __future__ import annotations

from embferry.engine.language import LanguageModel
from embferry.models import model_path
from embferry.protocol.layout import Geometry
from embferry.serve.config import Settings
from embferry.serve.http.serving import Report, unreported
from embferry.serve.language.app import build
from embferry.serve.language.service import LanguageService
from embferry.serve.worker.process import open_port, serve_worker
from embferry.serve.worker.transfer_settings import DTYPES, language_timeouts, layout_of
from embferry.serve.worker.transports import make_transports
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transports.contract import Transport


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the language model and serves until SIGINT or SIGTERM.

    Args:
        settings: settings of the deployment.
        report: called once, when the worker accepts requests.
    """
    listener = open_port(settings, settings.language.port)
    transports = make_transports(settings)  # before the model, so that a bad transport fails at once
    model = load(settings)
    service = service_of(model, settings, transports)
    serve_worker(build(service), service, listener, settings, "language", "", report)


def load(settings: Settings) -> LanguageModel:
    """Loads the language model of the settings.

    Raises:
        UnsupportedModel: the model's family has no adapter.
        CheckpointError: the model's files are incomplete or contradict each other.
    """
    return LanguageModel.load(
        model_path(settings.model),
        DTYPES[settings.dtype],
        threads=settings.threads,
        prefill_chunk_tokens=settings.language.prefill_chunk_tokens,
    )


def service_of(model: LanguageModel, settings: Settings, transports: list[Transport]) -> LanguageService:
    """Returns a running service. The caller closes it."""
    geometry = Geometry(layout_of(model.fields), settings.transfer.num_blocks, settings.transfer.block_size)
    manager = ReceiveManager(geometry, transports, settings=language_timeouts(settings))
    return LanguageService(model, manager, settings)
