"""``embferry encode``: an encode worker as a process."""

from __future__ import annotations

from embferry.engine.encoder import Encoder
from embferry.models import model_path
from embferry.serve.config import Settings
from embferry.serve.encode.app import build
from embferry.serve.encode.service import EncodeService
from embferry.serve.worker.address import address_of
from embferry.serve.worker.process import Report, open_port, serve_worker, unreported
from embferry.serve.worker.transfers import DTYPES, encode_timeouts, layout_of
from embferry.serve.worker.transports import make_transports
from embferry.transfer.send_manager import SendManager
from embferry.transports.contract import Transport


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the vision tower and serves until SIGINT or SIGTERM.

    Args:
        report: told once, when the worker answers.
    """
    listener = open_port(settings, settings.encode.port)
    transports = make_transports(settings)  # first: what is wrong with them need not wait for the model
    encoder = Encoder.load(model_path(settings.model), DTYPES[settings.dtype], threads=settings.threads)
    service = service_of(encoder, settings, transports)
    serve_worker(build(service), service, listener, settings, "encode", service.manager.endpoint, report)


def service_of(encoder: Encoder, settings: Settings, transports: list[Transport]) -> EncodeService:
    """A running service, to be closed by the caller."""
    manager = SendManager(
        layout_of(encoder.fields),
        transports,
        host=address_of(settings.host),
        advertise=address_of(settings.reachable_host),
        settings=encode_timeouts(settings),
    )
    return EncodeService(encoder, manager, settings)
