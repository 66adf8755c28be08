"""The settings of section ``security``, as every part of a process sees them: in its environment."""

from __future__ import annotations

import ipaddress
import os

from embferry.protocol.errors import LocalProtocolError, TlsFailed
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError, env_name
from embferry.serve.http.address import address_of
from embferry.serve.http.api_keys import ApiKeysError, read
from embferry.trust import Trust
from embferry.trust.policy import is_loopback
from embferry.trust.trust import INSECURE_ENV, KEY_FILE_ENV, TLS_ENV, TLS_HOSTS_ENV, TLS_REQUIRED_ENV


def apply(settings: Settings, *, replaces: bool = False) -> None:
    """Writes the section into the environment of this process, from which everything that listens or dials takes it.

    The processes that this one starts inherit it, instances of vLLM among them.

    Args:
        settings: The settings.
        replaces: Whether the settings were made of the environment, so that it need not say more than they do.

    Raises:
        ConfigError: The key file, the key or a TLS file cannot be used, or only some of the TLS files are given.
    """
    _check_tls_files(settings)
    own = settings.security
    files = zip((KEY_FILE_ENV, *TLS_ENV), (own.cluster_key_file, own.tls_ca, own.tls_cert, own.tls_key), strict=True)
    values = {name: str(file or "") for name, file in files}
    values |= {INSECURE_ENV: "1" if own.insecure else "", TLS_REQUIRED_ENV: "" if own.tls_required else "0"}
    values |= {TLS_HOSTS_ENV: "" if own.tls_check_hosts else "0"}
    for name, value in values.items():
        if value:
            os.environ[name] = value
        elif replaces:
            os.environ.pop(name, None)
    try:
        Trust.of_environment()
    except (LocalProtocolError, TlsFailed) as error:
        raise ConfigError([error.detail]) from error


def _check_tls_files(settings: Settings) -> None:
    """Raises ConfigError if some of the three TLS files are given, and others are not."""
    names = ("tls_ca", "tls_cert", "tls_key")
    given = [name for name in names if getattr(settings.security, name) is not None]
    missing = [name for name in names if name not in given]
    if given and missing:
        first = settings.place("security", given[0])
        flags = " and ".join(settings.place("security", name) for name in missing)
        variables = " and ".join(env_name(("security", name)) for name in missing)
        raise ConfigError([f"{first}: TLS needs all three files; give {flags} too (or {variables})"])


def check_part(settings: Settings, what: str) -> None:
    """Checks that a part, which only other parts use, may listen on the host of the settings.

    Raises:
        ConfigError: Strangers could reach it, and there is no cluster key.
    """
    try:
        Trust.of_environment().check_listening(settings.host, what)
    except LocalProtocolError as error:
        raise ConfigError([error.detail]) from error


def check_worker(settings: Settings) -> None:
    """Checks the addresses of a worker: its own, and the bootstrap server's.

    Raises:
        ConfigError: Other processes could not reach the address that the worker would advertise, or strangers could;
            or TLS is needed and not possible.
    """
    host = settings.reachable_host
    advertised = settings.place("host" if settings.advertise_host is None else "advertise_host")
    try:
        unspecified = ipaddress.ip_address(address_of(host)).is_unspecified
    except OSError as error:
        raise ConfigError([f"{advertised}: {host} has no address ({error.strerror or error})"]) from error
    check_part(settings, "the worker")
    if unspecified:
        why = "stands for every address of this machine; name the one by which others reach it with --advertise-host"
        raise ConfigError([f"{settings.place('host')} {host} {why}"])
    try:
        Trust.of_environment().check_host(host, "the worker")
    except TlsFailed as error:
        raise ConfigError([f"{advertised}: {error.detail}"]) from error
    check_bootstrap(settings)


def check_bootstrap(settings: Settings) -> None:
    """Checks that this part can ask the bootstrap server.

    Raises:
        ConfigError: Its URL needs TLS and there is no certificate, or there is one and TLS is required.
    """
    place = settings.place("bootstrap_url")
    try:
        Trust.of_environment().check_url(settings.bootstrap_url, "the bootstrap server's URL")
    except LocalProtocolError as error:
        raise ConfigError([f"{place}: {error.detail}"]) from error


def check_router(settings: Settings) -> None:
    """Checks that the router, which clients use, may listen on the host of the settings.

    Raises:
        ConfigError: Strangers could reach it, and it asks for no API key; or the file of API keys cannot be used.
    """
    if settings.router.api_keys_file is not None:
        try:
            read(settings.router.api_keys_file)
        except ApiKeysError as error:
            raise ConfigError([f"{settings.place('router', 'api_keys_file')}: {error.detail}"]) from error
    has_keys = settings.router.api_key is not None or settings.router.api_keys_file is not None
    if is_loopback(settings.host) or has_keys or settings.security.insecure:
        return
    raise ConfigError(
        [
            f"the router would listen on {settings.host} and serve every stranger that reaches it; set an API key"
            " (EMBFERRY_ROUTER_API_KEY, --router-api-keys-file), or allow that with --insecure"
        ]
    )
