"""The routers that a command looks at: its options, and how each of them is asked."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from embferry.cli.ask_words import base_url
from embferry.cli.options import fail, not_on_command_line
from embferry.protocol.errors import TlsFailed
from embferry.serve.config_load import env_name
from embferry.trust.tls import dialling_with
from embferry.trust.trust import TLS_ENV

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""Silence after which a router counts as gone. A stream without news has a comment every 10 s."""

Urls = Annotated[
    list[str],
    typer.Option("--url", help="A router's URL, with or without http:// and /v1. May be repeated.", metavar="URL"),
]
Ca = Annotated[
    str,
    typer.Option("--ca", help="PEM file with the CA of routers at https://.", metavar="FILE", envvar=TLS_ENV[0]),
]
ApiKey = Annotated[
    str,
    typer.Option("--api-key", hidden=True, envvar=env_name(("router", "api_key")), callback=not_on_command_line),
]


@dataclass(frozen=True, slots=True)
class Router:
    """A router that is asked for its activity.

    Attributes:
        url: its base URL.
        ca: the CA file of its certificate; "" for those of the system.
        api_key: "" for none.
        verify: the context of its certificate.
        transport: replaces the network in tests.
    """

    url: str
    ca: str = ""
    api_key: str = ""
    verify: ssl.SSLContext | bool = True
    transport: httpx.AsyncBaseTransport | None = None

    @property
    def shown_url(self) -> str:
        """The URL without the name and password that it may have."""
        scheme, _, rest = self.url.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"

    def client(self) -> httpx.AsyncClient:
        """Returns a client that asks this router."""
        import httpx

        from embferry.trust.bounded_answers import bounded_client

        timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=2)
        return bounded_client(limits=limits, timeout=timeout, verify=self.verify, transport=self.transport)

    def request(self, client: httpx.AsyncClient, path: str) -> httpx.Request:
        """Returns a request for a path, with the API key if there is one."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return client.build_request("GET", f"{self.url}{path}", headers=headers)


def routers(urls: list[str], ca: str, api_key: str) -> list[Router]:
    """Returns each router once. Ends the process if a URL or the CA file is wrong."""
    full = dict.fromkeys(base_url(url, "https" if ca else "http") for url in urls)
    try:
        verify = dialling_with(ca) if ca else True
    except TlsFailed as error:
        fail(error.detail)
    return [Router(url, ca, api_key, verify) for url in full]
