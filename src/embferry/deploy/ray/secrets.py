"""Secrets on Ray: each process takes them from its node, and none is in what Ray stores or shows."""

from __future__ import annotations

import os

from pydantic import SecretStr

from embferry.serve.config import Settings
from embferry.serve.config_values import api_key
from embferry.serve.supervisor.first_question import KEY


def with_api_key(settings: Settings) -> Settings:
    """Returns the settings with the router's API key of the environment, if there is one."""
    if not (text := os.environ.get(KEY)):
        return settings
    router = settings.router.model_copy(update={"api_key": SecretStr(api_key(text))})
    return settings.model_copy(update={"router": router})


def without_api_key(settings: Settings) -> Settings:
    """Returns the settings for other processes."""
    return settings.model_copy(update={"router": settings.router.model_copy(update={"api_key": None})})
