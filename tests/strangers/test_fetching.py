"""Strangers that have the router fetch from where only it can reach."""

from __future__ import annotations

import ipaddress

import httpx
import pytest

from tests.serve.workers.test_processes import ask
from tests.strangers.canary import TREASURE, Canary
from tests.strangers.running import Running

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

LOOPBACK = int(ipaddress.IPv4Address("127.0.0.1"))
HOSTS = {
    "address": "127.0.0.1",
    "another address of the loopback": "127.1.2.3",
    "every address": "0.0.0.0",
    "one number": str(LOOPBACK),
    "hexadecimal": hex(LOOPBACK),
    "octal": "0177.0.0.1",
    "short": "127.1",
    "name": "localhost",
    "with a dot at its end": "localhost.",
    "mapped": "[::ffff:127.0.0.1]",
    "compatible": "[::127.0.0.1]",
    "NAT64": "[64:ff9b::7f00:1]",
    "IPv6": "[::1]",
    "user and host": "127.0.0.1:80@localhost",
    "link-local, of clouds": "169.254.169.254",
    "private": "10.0.0.1",
    "full-width digits": "１２７.0.0.1",
}


def fetched(running: Running, url: str) -> httpx.Response:
    return ask(running.cluster, {"type": "image_url", "image_url": {"url": url}})


@pytest.mark.parametrize("how", HOSTS)
@pytest.mark.parametrize("through", ["directly", "by a redirect", "by two redirects"])
def test_no_private_address_is_asked(running: Running, listed: Canary, private: Canary, how: str, through: str) -> None:
    url = f"http://{HOSTS[how]}:{private.port}/secret"
    for _ in range(["directly", "by a redirect", "by two redirects"].index(through)):
        url = str(httpx.URL(f"http://127.0.0.1:{listed.port}/to", params={"url": url}))
    with running.untouched():
        answer = fetched(running, url)
    assert answer.status_code in (400, 403), answer.text
    assert answer.json()["error"]["code"] in ("host_not_allowed", "invalid_url", "fetch_failed")
    assert TREASURE not in answer.content
    assert private.asked == 0


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://127.0.0.1/", "data:image/png;base64,AAAA"])
def test_redirects_lead_to_no_other_scheme(running: Running, listed: Canary, target: str) -> None:
    url = str(httpx.URL(f"http://127.0.0.1:{listed.port}/to", params={"url": target}))
    with running.untouched():
        answer = fetched(running, url)
    assert answer.json()["error"]["code"] in ("unsupported_url_scheme", "fetch_failed"), answer.text


def test_the_canaries_can_be_reached(listed: Canary, running: Running) -> None:
    """A guard of these tests: a listed host is asked, and what it says is not a picture."""
    before = listed.asked
    answer = fetched(running, f"http://127.0.0.1:{listed.port}/")
    assert answer.json()["error"]["code"] == "unsupported_media_type"
    assert listed.asked == before + 1
