"""Real processes with a cluster key and certificates: they answer, and strangers get nothing from any port."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.serve.config import SecuritySettings
from embferry.serve.supervisor import LocalCluster
from embferry.trust.keys import Key
from embferry.trust.tls import Tls, dialling_with
from embferry.trust.trust import TLS_ENV
from tests.serve.workers.test_processes import SETTINGS, START, image
from tests.trust.authority import Authority

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def cluster(authority: Authority) -> Iterator[LocalCluster]:
    ca, cert, key = authority.files("part")
    security = SecuritySettings(tls_ca=ca, tls_cert=cert, tls_key=key)
    transfer = SETTINGS.transfer.model_copy(update={"transports": ("tcp",)})
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
            for name, path in zip(TLS_ENV, (ca, cert, key), strict=True):
                patch.setenv(name, str(path))
            settings = SETTINGS.model_copy(update={"transfer": transfer, "security": security})
            cluster = stack.enter_context(LocalCluster(settings))
            cluster.wait_ready()  # it asks the router, over TLS
        yield cluster


def ask(url: str, context: ssl.SSLContext) -> httpx.Response:
    content = [{"type": "text", "text": "What is there?"}, image()]
    body = {"model": SETTINGS.public_model_name, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return httpx.post(f"{url}/v1/chat/completions", json=body, verify=context, timeout=START, trust_env=False)


def urls(cluster: LocalCluster) -> dict[str, str]:
    return {view.name: view.url for view in cluster.processes}


def test_clients_need_the_ca_only(cluster: LocalCluster, authority: Authority) -> None:
    assert all(url.startswith("https://127.0.0.1:") for url in urls(cluster).values())
    answer = ask(cluster.url, dialling_with(authority.ca))
    assert answer.status_code == 200, answer.text
    assert answer.json()["embferry"]["transfer"]["transport"] == "tcp"


def test_ask_verifies_the_router_by_the_ca(cluster: LocalCluster, authority: Authority) -> None:
    runner = CliRunner()
    asked = runner.invoke(app, ["ask", "--url", cluster.url, "--ca", str(authority.ca), "What is there?"])
    assert asked.exit_code == 0, asked.output
    refused = runner.invoke(app, ["ask", "--url", cluster.url, "What is there?"], env={TLS_ENV[0]: ""})
    assert refused.exit_code == 1
    assert "certificate" in refused.output


def test_strangers_without_a_certificate_of_the_cluster_get_nothing(
    cluster: LocalCluster, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority.make(tmp_path).tls("stranger")
    stranger._files.value().dialling.load_verify_locations(authority.ca)
    for name, url in urls(cluster).items():
        if name == "router":
            continue
        for context in (dialling_with(authority.ca), stranger.dialling()):
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                httpx.get(f"{url}/health", verify=context, timeout=START, trust_env=False)
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health", timeout=START, trust_env=False)
        address = urlsplit(url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=START) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in plain.recv(1000)


def test_a_certificate_is_renewed_while_the_cluster_works(cluster: LocalCluster, authority: Authority) -> None:
    _, cert, key = authority.files("part-next")
    os.replace(key, authority.path / "part.key")
    os.replace(cert, authority.path / "part.pem")
    serials = set()
    tls = Tls(*authority.files("observer"))
    for url in urls(cluster).values():
        address = urlsplit(url)
        with (
            socket.create_connection((address.hostname or "", address.port or 0), timeout=START) as sock,
            tls.dialling().wrap_socket(sock, server_hostname=address.hostname) as stream,
        ):
            serials.add(json.dumps(stream.getpeercert()))
    assert len(serials) == 1
    expected = ssl._ssl._test_decode_cert(str(authority.path / "part.pem"))  # type: ignore[attr-defined]
    assert json.loads(serials.pop())["serialNumber"] == expected["serialNumber"]
    assert ask(cluster.url, dialling_with(authority.ca)).status_code == 200
