"""The commands of ``embferry``, called as a user calls them."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from embferry import __version__
from embferry.cli.ask import transfers
from embferry.cli.ask_words import is_media, part
from embferry.cli.main import app
from embferry.cli.options import COMMON
from embferry.serve.config import SECTIONS
from embferry.serve.config_load import FIELDS, flag_name
from tests.serve import pictures
from tests.serve.fakes import ANSWER, BREAK, TRANSFER, Deployment, closed_port, tokens

GUARD = 100
"""Seconds until a process or request counts as hanging."""
VERBS = ("serve", "router", "encode", "language", "bootstrap", "ask", "ui", "status", "top", "migrate", "version")


def called(*words: str, **environ: str) -> tuple[int, str, str]:
    """Runs the command; returns exit status, stdout and stderr."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    outcome = CliRunner().invoke(app, list(words), env=environ)
    root.handlers[:] = handlers  # a handler of the command writes to a stream that is closed now
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


@pytest.mark.parametrize("verb", ["serve", "encode", "language"])
def test_a_command_that_needs_the_engine_says_how_to_install_it(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embferry.cli.options.importlib.util.find_spec", lambda name: None)
    status, _, err = called(verb)
    assert (status, "pip install 'embferry[serve]'" in err) == (2, True)


def test_version_prints_the_version() -> None:
    status, out, _ = called("version")
    assert status == 0
    assert out.startswith(f"embferry {__version__} ")


def test_the_option_version_prints_the_version_alone() -> None:
    assert called("--version")[:2] == (0, f"embferry {__version__}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    status, out, _ = called(verb, "--help")
    assert status == 0
    assert f"embferry {verb}" in out.replace("root", "embferry")


def test_serve_has_an_option_for_every_setting() -> None:
    _, out, _ = called("serve", "--help")
    for section, model in SECTIONS.items():
        for name in model.model_fields:
            assert flag_name((section, name)) in out


@pytest.mark.parametrize("verb", ["serve", "router", "encode", "language", "bootstrap"])
def test_help_has_a_heading_for_each_section_and_the_common_options_first(verb: str) -> None:
    _, out, _ = called(verb, "--help")
    _, *parts = re.split(r"^(\S.*):\n", out, flags=re.MULTILINE)
    headings, texts = parts[::2], parts[1::2]
    assert headings[:2] == ["Common options", "Further settings of every process"]
    sections = [re.search(r"\[(\w+)\]$", heading)[1] for heading in headings[2:]]
    assert len(set(sections)) == len(sections)
    for section, text in zip(sections, texts[2:], strict=True):
        flags = re.findall(r"^  (?:--\S+, )?(--[\w-]+)", text, re.MULTILINE)
        assert flags
        assert section == "security" or all(flag.startswith(f"--{section}-") for flag in flags)
    common = re.findall(r"^  (--[\w-]+)", texts[0], re.MULTILINE)
    assert common[:2] == ["--config", "--model"]
    assert {"--port", "--host", "--log-level", "--help"} < set(common)
    assert len(common) <= 14
    assert not [key for key in COMMON if key not in FIELDS]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, embferry.cli.main\n"
        "heavy = {'torch', 'transformers', 'av', 'PIL', 'httpx', 'starlette', 'uvicorn', 'numpy', 'zmq'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=GUARD, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["serve", "router", "encode", "language", "bootstrap"])
def test_bad_settings_end_with_status_2_and_the_reasons(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("threads: many\n")
    status, _, err = called(verb, "--config", str(file), "--host", "", EMBFERRY_LOG_LEVEL="loud")
    assert status == 2
    assert f"embferry: {file}:1: threads: " in err
    assert "embferry: EMBFERRY_LOG_LEVEL: " in err
    assert "Traceback" not in err


def test_unknown_flags_and_verbs_end_with_status_2() -> None:
    assert called("router", "--prot", "1")[0] == 2
    assert called("rooter")[0] == 2


@pytest.mark.parametrize("verb", ["router", "encode", "language", "bootstrap"])
def test_a_word_that_no_option_takes_is_told_what_it_may_mean(verb: str) -> None:
    status, _, told = called(verb, "Qwen/Q", "more")
    assert status == 2
    assert told.endswith("Error: Qwen/Q is no option; if it is the model, use --model Qwen/Q\n")


@pytest.mark.parametrize("given", ["tls-ca", "tls-cert", "tls-key"])
def test_a_part_of_the_tls_files_is_told_the_options_that_are_missing(given: str) -> None:
    missing = [name for name in ("tls-ca", "tls-cert", "tls-key") if name != given]
    for verb in ("bootstrap", "router", "encode", "serve"):
        status, _, err = called(verb, f"--{given}", "file.pem")
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"embferry: --{given}: TLS needs all three files; give --{missing[0]} and --{missing[1]}")


@pytest.mark.parametrize("verb", ["encode", "language", "serve"])
def test_a_missing_model_is_reported_before_anything_starts(verb: str) -> None:
    status, _, err = called(verb, "--model", "/nowhere")
    assert status == 2
    assert "no model '/nowhere'" in err


@pytest.mark.parametrize("verb", ["serve", "encode"])
@pytest.mark.parametrize(
    ("option", "named"), [("--cache", "--cache"), ("--cache-url", "--cache-url"), (None, "EMBFERRY_CACHE_URL")]
)
def test_a_url_that_names_no_cache_is_refused_by_the_name_as_it_was_given(
    verb: str, option: str | None, named: str
) -> None:
    words, environ = ([option, "s3://b"], {}) if option else ([], {"EMBFERRY_CACHE_URL": "s3://b"})
    status, _, err = called(verb, *words, **environ)
    assert status == 2
    assert f"embferry: {named}: the URL of the cache begins with file:// or mooncake://" in err


def test_a_worker_that_encodes_nothing_has_no_cache() -> None:
    for verb in ("router", "language", "bootstrap"):
        assert "--cache" not in called(verb, "--help")[1]


def test_a_variable_of_sglang_causes_a_notice() -> None:
    status, _, err = called("encode", "--model", "/nowhere", SGLANG_EMBEDDING_CACHE_BUFFER_SIZE="3")
    assert "note: SGLANG_EMBEDDING_CACHE_BUFFER_SIZE is read as EMBFERRY_TRANSFER_NUM_BLOCKS=3" in err
    assert status == 2


@pytest.fixture
def media(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(pictures.png())
    (tmp_path / "b.MP4").write_bytes(pictures.video(3))
    return tmp_path


@pytest.mark.parametrize("word", ["{}/a.png", "{}/note", "none.webp", "https://h/a", "data:image/png;base64,AA"])
def test_ask_without_a_question_says_what_to_add(word: str, media: Path) -> None:
    (media / "note").write_text("a file without a suffix")
    word = word.format(media)
    for words in ((word,), (str(media / "b.MP4"), word)):
        status, out, err = called("ask", *words)
        assert (status, out) == (2, "")
        assert err.startswith(f"embferry: no question: add one after {word}, in quotes")


@pytest.mark.parametrize(
    "word", ["what?", "what is in a.png", "is https://h/a.png a cat?", "ratio 3.5?", "what? " * 1000, "a\0b"]
)
def test_a_question_is_not_taken_for_a_picture(word: str) -> None:
    assert not is_media(word)


@pytest.mark.integration
def test_ask_sends_the_files_and_prints_answer_and_transfer(deployment: Deployment, media: Path) -> None:
    files = (str(media / "a.png"), str(media / "b.MP4"))
    status, out, err = called("ask", *files, "what?", "--url", deployment.url, "-v", "--max-tokens", "9")
    assert (status, out) == (0, "a red circle\n")
    assert "64 tokens (4,096 bytes) in 1 initial and 7 resumed transfers over shm" in err
    items = deployment.fakes["encode0"].requests[0]["items"]
    sent = [(item["kind"], item["data"]) for item in items]
    assert sent == [("image", pictures.png()), ("video", pictures.video(3))]
    generation = deployment.fakes["language0"].requests[0]
    assert generation["messages"][0]["parts"][-1] == {"type": "text", "text": "what?"}
    assert generation["sampling"]["max_tokens"] == 9


@pytest.mark.integration
def test_ask_reports_each_kind_of_failure(deployment: Deployment, media: Path) -> None:
    here = ("--url", deployment.url)
    status, _, err = called("ask", str(media / "none.png"), "what?", *here)
    assert status == 2
    assert "none.png: No such file" in err
    status, _, err = called("ask", "what?", "--model", "other", *here)
    assert status == 1
    assert "'other' is not served here" in err
    deployment.fakes["language0"].script = [*tokens("a "), BREAK]
    status, out, err = called("ask", "what?", *here)
    assert (status, out) == (1, "a \n")
    assert "broke off" in err
    status, _, err = called("ask", "what?", "--url", deployment.fake_url)
    assert status == 1
    assert "is no router" in err
    deployment.fakes["language0"].script = ANSWER
    assert called("ask", "what?", *here)[1] == "a red circle\n"


@pytest.mark.integration
@pytest.mark.parametrize("deployment", [{"api_key": "right"}], indirect=True)
def test_ask_sends_the_api_key(deployment: Deployment) -> None:
    assert called("ask", "what?", "--url", deployment.url)[0] == 1
    assert called("ask", "what?", "--url", deployment.url, EMBFERRY_ROUTER_API_KEY="right")[0] == 0


@pytest.mark.integration
def test_ask_without_a_router_says_how_to_start_one() -> None:
    with closed_port() as url:
        status, _, err = called("ask", "what?", "--url", url)
    assert status == 1
    assert url in err
    assert "embferry serve" in err


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("https://h/a.png", "image_url"),
        ("https://h/a.mp4?x=1.png", "video_url"),
        ("data:video/mp4;base64,AA", "video_url"),
        ("file:///a/b.webm", "video_url"),
        ("data:image/png;base64,AA", "image_url"),
    ],
)
def test_ask_sends_urls_unchanged(word: str, kind: str) -> None:
    assert part(word) == {"type": kind, kind: {"url": word}}


def test_ask_describes_the_transfer() -> None:
    assert "no transfer" in transfers({"transfer": None})
    assert "do not report" in transfers({})
    assert "room 5" in transfers({"room": 5, "transfer": TRANSFER})
    one = {"total_tokens": 1, "bytes": 1, "initial": 1, "resumed": 1, "transport": "tcp"}
    told = transfers({"room": 5, "transfer": one})
    assert told == "1 token (1 byte) in 1 initial and 1 resumed transfer over tcp, room 5"


@pytest.mark.integration
def test_router_and_bootstrap_processes_serve_and_end_on_a_signal() -> None:
    """Starts the real processes; they find each other, and end on SIGTERM and SIGINT without a traceback."""
    environ = {**os.environ, "EMBFERRY_LOG_FORMAT": "plain"}
    started = []
    try:
        port = _start(started, environ, "bootstrap", "--port", "0")
        url = f"http://127.0.0.1:{_start(started, environ, 'router', '--port', '0', '--bootstrap-url', port)}"
        with httpx.Client(base_url=url, verify=False, trust_env=False, timeout=GUARD) as http:
            assert http.get("/health").status_code == 200
            missing = http.get("/ready").json()["missing"]
            assert [m for m in missing if "encode" in m]
            assert [m for m in missing if "language" in m]
        for process, sign in zip(started, (signal.SIGTERM, signal.SIGINT), strict=True):
            process.send_signal(sign)
            assert process.wait(GUARD) in (0, 130, -signal.SIGTERM, -signal.SIGINT)
            assert "Traceback" not in process.stderr.read()
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stderr.close()


def _start(started: list[subprocess.Popen[str]], environ: dict[str, str], verb: str, *options: str) -> str:
    """Starts a verb; returns the port it listens on, or the URL of the bootstrap server."""
    command = [sys.executable, "-m", "embferry", verb, *options]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    started.append(process)
    for line in process.stderr:
        if found := re.search(r"listens on (http://[\d.]+:(\d+))", line):
            return found[1] if verb == "bootstrap" else found[2]
    raise AssertionError(f"{verb} ended with status {process.wait()}")


@pytest.mark.integration
@pytest.mark.parametrize("verb", ["router", "bootstrap"])
def test_a_port_in_use_is_reported_in_one_line(verb: str, deployment: Deployment) -> None:
    port = deployment.url.rpartition(":")[2]
    status, _, err = called(verb, "--port", port)
    assert status == 1
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("embferry: ")]  # the deployment logs there, too
    assert f"127.0.0.1:{port}" in line
    assert "--port" in line.split()  # as it was typed


@pytest.mark.integration
def test_ask_takes_addresses_as_people_write_them(deployment: Deployment) -> None:
    for url in (f"{deployment.url}/v1", deployment.url.removeprefix("http://")):
        assert called("ask", "what?", "--url", url)[:2] == (0, "a red circle\n")
