"""The settings of section ``security``, as every part of a process sees them: in its environment."""

from __future__ import annotations

import os

from embferry.protocol.errors import LocalProtocolError, TlsFailed
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.trust import Trust
from embferry.trust.policy import is_loopback
from embferry.trust.trust import INSECURE_ENV, KEY_FILE_ENV, TLS_ENV, TLS_REQUIRED_ENV


def apply(settings: Settings, *, replaces: bool = False) -> None:
    """Writes the section into the environment of this process, from which everything that listens or dials takes it.

    The processes that this one starts inherit it, instances of vLLM among them.

    Args:
        settings: The settings.
        replaces: Whether the settings were made of the environment, so that it need not say more than they do.

    Raises:
        ConfigError: The key file, the key or a TLS file cannot be used.
    """
    own = settings.security
    files = zip((KEY_FILE_ENV, *TLS_ENV), (own.cluster_key_file, own.tls_ca, own.tls_cert, own.tls_key), strict=True)
    values = {name: str(file or "") for name, file in files}
    values |= {INSECURE_ENV: "1" if own.insecure else "", TLS_REQUIRED_ENV: "" if own.tls_required else "0"}
    for name, value in values.items():
        if value:
            os.environ[name] = value
        elif replaces:
            os.environ.pop(name, None)
    try:
        Trust.of_environment()
    except (LocalProtocolError, TlsFailed) as error:
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
    has_keys = settings.router.api_key is not None or settings.router.api_keys_file is not None
    if is_loopback(settings.host) or has_keys or settings.security.insecure:
        return
    raise ConfigError(
        [
            f"the router would listen on {settings.host} and serve every stranger that reaches it; set an API key"
            " (EMBFERRY_ROUTER_API_KEY, --router-api-keys-file), or allow that with --insecure"
        ]
    )
