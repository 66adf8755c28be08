"""``embferry probe``: what it asks, with which certificate, and its exit status."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.cli.health import probe
from embferry.cli.main import app
from embferry.trust.certificates import make_ca, make_certificate
from embferry.trust.trust import TLS_ENV

pytestmark = pytest.mark.integration


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/health": 200, "/moved": 302}.get(self.path, 503))
        self.end_headers()
        self.wfile.write(b'{"reason": "no \x1b[31mworker"}')

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def server(context: ssl.SSLContext | None = None) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as one:
        if context is not None:
            one.socket = context.wrap_socket(one.socket, server_side=True)
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        try:
            yield one.server_address[1]
        finally:
            one.shutdown()
            thread.join()


def test_the_status_says_whether_the_answer_is_200(capsys: pytest.CaptureFixture[str]) -> None:
    with server() as port:
        assert [probe(f"127.0.0.1:{port}"), probe(f"http://127.0.0.1:{port}/health")] == [0, 0]
        assert capsys.readouterr() == ("", "")
        assert [probe(f"127.0.0.1:{port}/ready"), probe(f"127.0.0.1:{port}/moved")] == [1, 1]
        told = capsys.readouterr().err
        assert f"127.0.0.1:{port}/ready: 503" in told
        assert "no \\x1b[31mworker" in told, "an answer is foreign text"
    assert probe(f"127.0.0.1:{port}") == 1
    assert "refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/", "http://", "127.0.0.1:port", "[::1", ":", "http://127.0.0.1:99999"]
)
def test_what_is_no_url_is_an_error_in_a_sentence(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe(url) == 1
    assert capsys.readouterr().err.startswith("embferry: ")


def test_with_tls_it_shows_the_certificate_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is for another host: on the loopback interface, only its CA counts."""
    ca, _ = make_ca(tmp_path)
    cert, key = make_certificate("part", ["part.example.com"], tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    other_ca, _ = make_ca(foreign)
    other = make_certificate("part", ["part.example.com"], foreign)
    with server(context) as port:
        for name, path in zip(TLS_ENV, (ca, cert, key), strict=True):
            monkeypatch.setenv(name, str(path))
        assert probe(f"127.0.0.1:{port}") == 0
        assert probe(f"http://127.0.0.1:{port}") == 1
        for name, path in zip(TLS_ENV, (other_ca, *other), strict=True):
            monkeypatch.setenv(name, str(path))
        assert probe(f"127.0.0.1:{port}") == 1


def test_the_command_and_its_short_way_agree() -> None:
    """The entry of the command asks without importing the command line, which takes ten times as long."""
    with server() as port:
        for path, status in (("", 0), ("/ready", 1)):
            url = f"127.0.0.1:{port}{path}"
            assert CliRunner().invoke(app, ["probe", url]).exit_code == status
            program = (
                "import sys; sys.argv = ['embferry', 'probe', sys.argv[1]]\n"
                "from embferry.cli.entry import run\n"
                "try:\n    run()\nfinally:\n    print(*sorted({'typer', 'pydantic', 'httpx', 'rich'} & {*sys.modules}))"
            )
            done = subprocess.run(
                [sys.executable, "-c", program, url], capture_output=True, text=True, timeout=60, check=False
            )
            assert (done.returncode, done.stdout) == (status, "\n"), done.stderr
