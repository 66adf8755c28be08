"""``embferry encode``, ``embferry language`` and ``embferry bootstrap``.

The commands import heavy modules only once they know that the settings and the model are valid.
"""

from __future__ import annotations

from importlib.util import find_spec

from embferry.cli.options import fail, settings_command
from embferry.models import model_path
from embferry.observe.logs import configure
from embferry.serve.config import Settings


def checked_model(settings: Settings) -> None:
    """Configures the log. Ends the process with status 2 if the model does not exist or torch is not installed."""
    if find_spec("torch") is None:
        fail("torch is not installed; install it with: pip install 'embferry[serve]'")
    try:
        model_path(settings.model)
    except ValueError as error:
        fail(f"model: {error}")
    configure(settings.log_level, settings.log_format)


def _encode(settings: Settings) -> None:
    """Start an encode worker: pictures and videos in, embeddings out."""
    checked_model(settings)
    from embferry.serve.encode.process import run

    run(settings)


def _language(settings: Settings) -> None:
    """Start a language worker: prompts and embeddings in, answers out."""
    checked_model(settings)
    from embferry.serve.language.process import run

    run(settings)


def _bootstrap(settings: Settings) -> None:
    """Start the bootstrap server, where workers register and routers find them."""
    configure(settings.log_level, settings.log_format)
    from embferry.discovery.bootstrap_server import run
    from embferry.protocol.errors import TransportError

    try:
        run(settings.host, settings.bootstrap.port, settings.bootstrap.lease)
    except TransportError as error:
        fail(error.detail, status=1)


encode = settings_command(("encode",), ("", "transfer", "media", "encode"), _encode)
language = settings_command(("language",), ("", "transfer", "language"), _language)
bootstrap = settings_command(("bootstrap",), ("", "bootstrap"), _bootstrap)
