"""``embferry encode``: the process of an encode worker."""

from __future__ import annotations

from embferry.engine.encoder import Encoder
from embferry.models import model_path
from embferry.serve.config import Settings
from embferry.serve.encode.app import build
from embferry.serve.encode.service import EncodeService
from embferry.serve.http.serving import Report, unreported
from embferry.serve.worker.address import address_of
from embferry.serve.worker.process import open_port, serve_worker
from embferry.serve.worker.transfer_settings import DTYPES, encode_timeouts, layout_of
from embferry.serve.worker.transports import make_transports
from embferry.transfer.send_manager import SendManager
from embferry.transports.contract import Transport


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the vision tower and serves until SIGINT or SIGTERM.

    Args:
        settings: settings of the deployment.
        report: called once, when the worker accepts requests.
    """
    listener = open_port(settings, settings.encode.port)
    transports = make_transports(settings)  # before the model, so that a bad transport fails at once
    encoder = Encoder.load(model_path(settings.model), DTYPES[settings.dtype], threads=settings.threads)
    service = service_of(encoder, settings, transports)
    serve_worker(build(service), service, listener, settings, "encode", service.manager.endpoint, report)


def service_of(encoder: Encoder, settings: Settings, transports: list[Transport]) -> EncodeService:
    """Returns a running service. The caller closes it."""
    manager = SendManager(
        layout_of(encoder.fields),
        transports,
        host=address_of(settings.host),
        advertise=address_of(settings.reachable_host),
        settings=encode_timeouts(settings),
    )
    return EncodeService(encoder, manager, settings)
