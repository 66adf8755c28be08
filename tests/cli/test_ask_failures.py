"""Questions of ``embferry ask`` without an answer: each is told in one sentence what is wrong, and where."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embferry.cli import ask, ask_failures
from embferry.cli.ask_failures import sentence
from embferry.discovery.bootstrap_server import BootstrapServer
from tests.cli.servers import Router, router
from tests.serve import pictures
from tests.serve.test_cli import called

pytestmark = pytest.mark.integration


@pytest.fixture
def server() -> Iterator[Router]:
    with router() as started:
        yield started


def error(text: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": text, "type": "invalid_request_error", "param": param, "code": "c"}}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("htp://127.0.0.1:8000", "htp:// is not spoken here, http:// and https:// are"),
        ("ftp://127.0.0.1", "ftp:// is not spoken here, http:// and https:// are"),
        ("http://127.0.0.1:abc", "the port abc is no number from 1 to 65535"),
        ("127.0.0.1:abc/v1", "the port abc is no number from 1 to 65535"),
        ("http://127.0.0.1:99999", "the port 99999 is no number from 1 to 65535"),
        ("http://127.0.0.1:0", "the port 0 is no number from 1 to 65535"),
        ("http://127.0.0.1:-1", "the port -1 is no number from 1 to 65535"),
        ("http://127.0.0.1:", "the port after the colon is no number from 1 to 65535"),
        (":8000", "it names no host"),
        ("http://", "it names no host"),
        ("", "it names no host"),
        ("http:/127.0.0.1:8000", "two slashes follow the colon"),
        ("https:127.0.0.1", "two slashes follow the colon"),
        ("http://127.0.0.1:8000 /v1", "it has a space or control character"),
        ("http://[::1:8000", "invalid IPv6 URL"),
    ],
)
def test_a_wrong_url_is_told_what_is_wrong_with_it(url: str, why: str) -> None:
    status, out, err = called("ask", "what?", "--url", url)
    assert (status, out) == (2, "")
    assert err == f"embferry: --url {url.strip()} is wrong: {why}; write it such as --url http://127.0.0.1:8000\n"


@pytest.mark.parametrize("words", [(), ("--model", "m")])
def test_the_bootstrap_server_is_no_router(words: tuple[str, ...]) -> None:
    with BootstrapServer("127.0.0.1", 0) as bootstrap:
        url = f"http://127.0.0.1:{bootstrap.port}"
        status, _, err = called("ask", "what?", "--url", url, *words)
    assert status == 1
    assert err.startswith(f"embferry: the server at {url} is no router: it has status ")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"220 mail.example.org ESMTP\r\n\r\n", "is no router: it speaks no HTTP ("),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "closed the connection without an answer; is it a router?"),
        (b"", "closed the connection without an answer; is it a router?"),
        (None, "does not answer; is it a router?"),
    ],
)
def test_a_server_without_http_is_no_router(said: bytes | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "MODELS_SECONDS", 0.2 if said is None else 30.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(said or b"")
                connection.recv(1 << 16)
                if said is None:
                    connection.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ask_failures, "_speaks_tls", lambda url: False)  # it accepts once
            status, _, err = called("ask", "what?", "--url", url)
        thread.join()
    assert status == 1
    assert err.startswith(f"embferry: the server at {url} {why}")


@pytest.mark.parametrize("words", [(), ("--model", "m")])
def test_while_no_model_is_served_the_answer_to_the_question_says_why(words: tuple[str, ...], server: Router) -> None:
    server.models = []
    server.answer = 503, error("no language instance answers: http://127.0.0.1:1 connection refused")
    status, out, err = called("ask", "what?", "--url", server.url, *words)
    assert (status, out) == (1, "")
    assert err == "embferry: no language instance answers: http://127.0.0.1:1 connection refused\n"
    assert server.asked[0].get("model") == (words[1] if words else None)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_of_several_files_the_bad_one_is_named(bad: int, server: Router, tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number}.png") for number in range(2)]
    for name in names:
        Path(name).write_bytes(pictures.png())
    names.append("https://h/2.png")
    server.answer = 400, error("the picture ends too early", f"messages[0].content[{bad}].image_url.url")
    _, _, err = called("ask", *names, "what?", "--url", server.url)
    assert err == f"embferry: {names[bad]}: the picture ends too early\n"


@pytest.mark.parametrize(
    "param", [None, "messages", "messages[0].content[2]", "messages[1].content[0]", 5, "max_tokens"]
)
def test_an_error_of_something_else_names_no_file(param: Any) -> None:
    assert sentence(error("wrong", param), ["a.png", "b.png"]) == "wrong"


@pytest.mark.parametrize("told", [None, [], "text", {}, {"error": None}, {"error": "text"}, {"detail": "Not Found"}])
def test_json_of_another_server_is_no_error_of_a_router(told: Any) -> None:
    assert sentence(told, []) == ""


def test_a_file_url_is_told_what_it_means(server: Router, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/a.png"
    server.answer = 403, error("no folder is allowed (media.allowed_folders)", "messages[0].content[0]")
    _, _, err = called("ask", url, "what?", "--url", server.url)
    assert err == (
        f"embferry: {url}: no folder is allowed (media.allowed_folders) "
        f"({url} is a file of the router's machine; for one of this machine, leave out file://)\n"
    )


def test_an_answer_that_is_cut_off_says_how_to_get_more(server: Router) -> None:
    server.finish = "length"
    assert called("ask", "what?", "--url", server.url) == (
        0,
        "a red circle\n",
        "embferry: the answer has been cut off after 512 tokens; --max-tokens takes more\n",
    )
    assert called("ask", "what?", "--url", server.url, "--max-tokens", "0")[2] == ""
    assert [body.get("max_tokens") for body in server.asked] == [512, None]
