"""The settings of section ``security``, as every part of a process sees them: in its environment."""

from __future__ import annotations

import os

from embferry.protocol.errors import LocalProtocolError
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.trust import Trust
from embferry.trust.policy import is_loopback
from embferry.trust.trust import INSECURE_ENV, KEY_FILE_ENV


def apply(settings: Settings, *, replaces: bool = False) -> None:
    """Writes the section into the environment of this process, from which everything that listens or dials takes it.

    The processes that this one starts inherit it, instances of vLLM among them.

    Args:
        settings: The settings.
        replaces: Whether the settings were made of the environment, so that it need not say more than they do.

    Raises:
        ConfigError: The key file or the key cannot be used.
    """
    file = settings.security.cluster_key_file
    for name, value in ((KEY_FILE_ENV, str(file or "")), (INSECURE_ENV, "1" if settings.security.insecure else "")):
        if value:
            os.environ[name] = value
        elif replaces:
            os.environ.pop(name, None)
    try:
        Trust.of_environment()
    except LocalProtocolError as error:
        raise ConfigError([error.detail]) from error


def check_part(settings: Settings, what: str) -> None:
    """Checks that a part, which only other parts use, may listen on the host of the settings.

    Raises:
        ConfigError: Strangers could reach it, and there is no cluster key.
    """
    try:
        Trust.of_environment().check_listening(settings.host, what)
    except LocalProtocolError as error:
        raise ConfigError([error.detail]) from error


def check_router(settings: Settings) -> None:
    """Checks that the router, which clients use, may listen on the host of the settings.

    Raises:
        ConfigError: Strangers could reach it, and it asks for no API key.
    """
    if is_loopback(settings.host) or settings.router.api_key is not None or settings.security.insecure:
        return
    raise ConfigError(
        [
            f"the router would listen on {settings.host} and serve every stranger that reaches it; set an API key"
            " (EMBFERRY_ROUTER_API_KEY), or allow that with --insecure"
        ]
    )
