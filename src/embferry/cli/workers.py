"""The check of the model, before a command imports anything heavy."""

from __future__ import annotations

from embferry.cli.options import fail
from embferry.models import model_path
from embferry.observe.logs import configure
from embferry.serve.config import Settings


def checked_model(settings: Settings) -> None:
    """Configures the log. Ends the process with status 2 if the model does not exist."""
    try:
        model_path(settings.model)
    except ValueError as error:
        fail(f"model: {error}")
    configure(settings.log_level, settings.log_format)
