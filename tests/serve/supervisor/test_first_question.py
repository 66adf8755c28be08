"""The commands that are shown when a deployment is ready. Another test runs them: ``test_processes.py``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from embferry.serve.config import RouterSettings, Settings
from embferry.serve.supervisor import first_question, serve
from embferry.serve.supervisor.first_question import ask_line, curl_line
from embferry.trust.trust import TLS_ENV

URL = "http://127.0.0.1:8000"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command in an environment that is not on PATH."""
    command = tmp_path / "some bin" / "embferry"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(command), "serve"])
    return command


def test_the_command_is_named_as_it_can_be_typed(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(ask_line(URL))
    assert words == [str(installed), "ask", "--url", URL, words[4], "what colour is the circle?"]
    assert Path(words[4]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("PATH", str(installed.parent))
    assert shlex.split(ask_line(URL))[0] == "embferry"
    monkeypatch.setattr(sys, "argv", ["-c", "serve"])
    assert shlex.split(ask_line(URL))[:3] == [sys.executable, "-m", "embferry"]


def test_a_path_below_the_working_directory_is_short(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(installed.parent.parent)
    assert shlex.split(ask_line(URL))[0] == "some bin/embferry"


def test_curl_gets_the_key_from_the_shell_and_never_shows_it() -> None:
    assert "Authorization" not in curl_line(URL, Settings())
    for router in (RouterSettings(api_key=SecretStr("s3cret")), RouterSettings(api_keys_file=Path("keys"))):
        line = curl_line(URL, Settings(router=router))
        assert '-H "Authorization: Bearer $EMBFERRY_ROUTER_API_KEY"' in line
        assert "s3cret" not in line


def test_with_tls_both_commands_name_the_ca(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TLS_ENV[0], "/a b/ca.pem")
    url = URL.replace("http:", "https:")
    assert "--ca '/a b/ca.pem'" in ask_line(url)
    assert "--cacert '/a b/ca.pem'" in curl_line(url, Settings())
    assert "ca.pem" not in curl_line(URL, Settings())


def test_the_curl_line_is_short_enough_to_paste() -> None:
    assert len(curl_line(URL, Settings())) < 700
    assert first_question.PICTURE.stat().st_size < 250


@pytest.mark.parametrize("api_key", [None, SecretStr("k")])
def test_on_a_terminal_each_command_is_a_line_of_its_own_and_sentences_fit(
    api_key: SecretStr | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(router=RouterSettings(api_key=api_key))
    monkeypatch.setattr(serve.os, "isatty", lambda fd: True)
    serve.invite(URL, settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert ("EMBFERRY_ROUTER_API_KEY" in lines[0]) == (api_key is not None)
    assert lines[1] == "The right answer is red. Ctrl-C here ends everything."
    assert max(map(len, lines[:2])) < 80
    assert lines[2:] == [ask_line(URL), curl_line(URL, settings)]


def test_in_a_log_each_command_is_in_a_line_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(serve.os, "isatty", lambda fd: False)
    serve.invite(URL, Settings())
    _, ask, curl = [record.getMessage() for record in caplog.records]
    assert (ask, curl) == (f"try: {ask_line(URL)}", f"or: {curl_line(URL, Settings())}")
