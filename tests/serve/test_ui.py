"""``embferry ui``: the address of the live page, and a browser where there is one."""

from __future__ import annotations

import webbrowser

import pytest

from tests.cli.servers import router
from tests.serve.fakes import Deployment, closed_port
from tests.serve.test_cli import called

pytestmark = pytest.mark.integration


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    urls: list[str] = []
    monkeypatch.setattr(webbrowser, "open", urls.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return urls


def test_it_prints_the_address_of_the_page(deployment: Deployment, opened: list[str]) -> None:
    assert called("ui", "--url", f"{deployment.url}/v1") == (0, f"{deployment.url}/\n", "")
    assert opened == []


@pytest.mark.parametrize("words", [(), ("--no-browser",)])
def test_it_opens_a_browser_where_windows_can_be_opened(
    deployment: Deployment, opened: list[str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    assert called("ui", "--url", deployment.url, *words)[0] == 0
    assert opened == ([] if words else [f"{deployment.url}/"])


def test_without_a_router_it_says_so(opened: list[str]) -> None:
    with closed_port() as url:
        status, out, err = called("ui", "--url", url)
    assert (status, out, opened) == (1, "", [])
    assert f"no server responds at {url}" in err


def test_another_server_is_no_router(opened: list[str]) -> None:
    with router() as other:
        status, out, err = called("ui", "--url", other.url)
    assert (status, out, opened) == (1, "", [])
    assert f"the server at {other.url} is no router" in err
