"""``embferry ask`` and TLS: each wrong address or CA is told with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.serve.supervisor.first_question import ask_options
from embferry.trust.trust import TLS_ENV
from tests.serve.test_cli import called
from tests.serve.test_tls import Served
from tests.trust.authority import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> tuple[Path, Path, Path]:
    return authority.files("part", "127.0.0.1")


@pytest.fixture
def environment(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in zip(TLS_ENV, files, strict=True):
        monkeypatch.setenv(name, str(path))


def asked(url: str, *words: str) -> str:
    """Returns what a question without an answer is told. The CA comes from the words alone."""
    status, out, err = called("ask", "what?", "--url", url, *words, **{TLS_ENV[0]: ""})
    assert (status, out) == (1, "")
    assert "embferry serve" not in err  # there is a router
    return err


@pytest.mark.integration
def test_a_router_whose_ca_is_not_known(environment: None, authority: Authority, tmp_path: Path) -> None:
    other = str(Authority.make(tmp_path).ca)
    with Served(clients=False) as router:
        without = asked(router.url)
        wrong = asked(router.url, "--ca", other)
        right = called("ask", "what?", "--url", router.url, "--ca", str(authority.ca))[2]
    for text in (without, wrong):
        assert "the certificate is not accepted" in text
        assert f"--ca FILE or {TLS_ENV[0]}" in text or f"the CA in {other}" in text
    assert other in wrong
    assert "status 404" in right  # the server of this test has no models


@pytest.mark.integration
def test_a_certificate_for_another_host(environment: None, authority: Authority) -> None:
    with Served(clients=False) as router:
        text = asked(router.url.replace("127.0.0.1", "localhost"), "--ca", str(authority.ca))
    assert "must be for this host" in text


@pytest.mark.integration
@pytest.mark.parametrize("has_ca", [True, False])
def test_plain_http_to_a_router_with_tls(environment: None, authority: Authority, has_ca: bool) -> None:
    with Served(clients=False) as router:
        text = asked(router.url.replace("https", "http"), *(["--ca", str(authority.ca)] if has_ca else []))
    assert f"Write https:// instead: {router.url}" in text
    assert ("--ca FILE" in text) is not has_ca


@pytest.mark.integration
def test_tls_to_a_router_without(authority: Authority) -> None:
    with Served(clients=False) as router:
        text = asked(router.url.replace("http", "https"), "--ca", str(authority.ca))
    assert f"Write http:// instead: {router.url}" in text


def test_the_line_to_try_names_the_ca(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TLS_ENV[0], raising=False)
    assert ask_options("http://127.0.0.1:1") == "--url http://127.0.0.1:1"
    monkeypatch.setenv(TLS_ENV[0], "/a b/ca.pem")
    assert ask_options("https://127.0.0.1:1") == "--url https://127.0.0.1:1 --ca '/a b/ca.pem'"
    assert ask_options("http://127.0.0.1:1") == "--url http://127.0.0.1:1"  # TLS is not required yet
