"""Questions of ``embferry ask`` without an answer: each is told in one sentence what is wrong, and where."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.cli import ask, ask_failures
from embferry.cli.ask_failures import sentence
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.serve.errors import ServeError
from embferry.serve.media.formats import READ, Kind, sniff
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
        ("http://a..b:8000", "a..b is no name of a host"),
        ("http://.:8000", ". is no name of a host"),
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


MORE, ALL = "--max-tokens takes more", "which is all that the router or the model allows"


@pytest.mark.parametrize(
    ("wanted", "counted", "note"),
    [
        (None, None, f"cut off after 512 tokens; {MORE}"),
        (None, 512, f"cut off after 512 tokens; {MORE}"),
        (None, 100, f"cut off after 100 tokens, {ALL}"),
        ("1", None, f"cut off after 1 token; {MORE}"),
        ("2000", 2000, f"cut off after 2,000 tokens; {MORE}"),
        ("0", 1024, f"cut off after 1,024 tokens, {ALL}"),
        ("0", 1, f"cut off after 1 token, {ALL}"),
        ("0", None, f"cut off, {ALL}"),
    ],
)
def test_an_answer_that_is_cut_off_always_says_so(
    wanted: str | None, counted: int | None, note: str, server: Router
) -> None:
    server.finish, server.usage = "length", counted
    words = ("--max-tokens", wanted) if wanted else ()
    status, out, err = called("ask", "what?", "--url", server.url, *words)
    assert (status, out, err) == (0, "a red circle\n", f"embferry: the answer has been {note}\n")
    assert server.asked[0].get("max_tokens") == (int(wanted or 512) or None)


@pytest.mark.parametrize("finish", ["abort", "error", "content_filter", "tool_calls", "repetition", None])
def test_an_answer_that_ends_for_another_reason_is_a_failure(finish: str | None, server: Router) -> None:
    server.finish = finish
    status, out, err = called("ask", "what?", "--url", server.url)
    assert (status, out) == (1, "a red circle\n")
    assert err == (
        f"embferry: the answer is not complete: the server ended it early ({finish or 'without a reason'})\n"
    )


@pytest.mark.parametrize(
    "odd", ["{", "5", "[]", "null", "{}", '{"choices": 5}', '{"choices": [{}]}', '{"choices": ["x"]}']
)
def test_an_answer_in_another_form_is_told_in_one_line(odd: str, server: Router) -> None:
    server.odd = f"data: {odd}\n\n"
    status, _, err = called("ask", "what?", "--url", server.url)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"embferry: the server at {server.url} is no router: ")


@pytest.mark.parametrize("key", ["secret-1\n", "\tsecret-1 \r\n", "secret-1"])
def test_white_space_around_the_api_key_does_not_count(key: str, server: Router) -> None:
    server.key = "secret-1"
    assert called("ask", "what?", "--url", server.url, EMBFERRY_ROUTER_API_KEY=key)[:2] == (0, "a red circle\n")


@pytest.mark.parametrize("key", ["secret-\u00fc", "secret-\u2026", "secret\n-1", "secret\x7f", " \n", "\udcff"])
def test_an_api_key_that_cannot_be_sent_is_never_shown(key: str, server: Router) -> None:
    status, out, err = called("ask", "what?", "--url", server.url, EMBFERRY_ROUTER_API_KEY=key)
    assert (status, out, err.count("\n"), server.asked) == (2, "", 1, [])
    assert err.startswith("embferry: EMBFERRY_ROUTER_API_KEY: an API key ")
    assert "sec" not in err


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("", "the router asks for an API key; set EMBFERRY_ROUTER_API_KEY to it"),
        ("secret-2", "the router does not know the API key in EMBFERRY_ROUTER_API_KEY; set it to another one"),
    ],
)
def test_a_missing_or_wrong_api_key_is_told_the_variable(given: str, why: str, server: Router) -> None:
    server.key = "secret-1"
    status, out, err = called("ask", "what?", "--url", server.url, EMBFERRY_ROUTER_API_KEY=given)
    assert (status, out, err) == (1, "", f"embferry: {why}\n")


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("http://localhost", "80, and a router's is 8000: http://localhost:8000"),
        ("https://h/proxy", "443, and a router's is 8000: https://h:8000/proxy"),
        ("http://[::1]", "80, and a router's is 8000: http://[::1]:8000"),
    ],
)
def test_a_url_without_a_port_is_told_which_one_it_has(url: str, full: str) -> None:
    refused = httpx.ConnectError("[Errno 111] Connection refused")
    assert f"without a port this is {full}. Start" in ask_failures.reason(url, refused, "")
    assert "without a port" not in ask_failures.reason(f"{url.partition('/proxy')[0]}:1", refused, "")
    unknown = httpx.ConnectError("no such name")
    unknown.__cause__ = socket.gaierror(-2, "Name or service not known")
    assert "without a port" not in ask_failures.reason(url, unknown, "")


@pytest.mark.parametrize("kind", READ)
def test_a_file_of_no_known_format_is_told_the_pictures_and_the_videos(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(ServeError) as refusal:
        sniff(b"some text", kind)
    said = sentence(error(refusal.value.detail), ["text.txt"])
    assert all(formats in said for formats in READ.values())
