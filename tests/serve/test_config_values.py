"""Settings that are hosts, URLs or lists of them: what could never have an effect is refused, by the option's name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from embferry.serve.config import MediaSettings, RouterSettings, Settings
from embferry.serve.config_load import FIELDS, ConfigError, Key, flag_name, load
from embferry.serve.router import process as router_process

HOSTS, ORIGINS = ("media", "allowed_hosts"), ("router", "cors_origins")
ADVERTISE, PROXY = ("transfer", "http_advertise"), ("transfer", "http_proxy")
ENCODE, LANGUAGE, ZMQ = ("vllm", "encode_urls"), ("vllm", "language_urls"), ("vllm", "consumer_zmq")
PREFILL, DECODE = ("vllm", "prefill_urls"), ("vllm", "decode_urls")
METRICS = ("vllm", "connector_metrics_urls")
CACHE = ("cache", "url")
SOUND: dict[Key, tuple[str, ...]] = {
    HOSTS: (
        "*", "*:8080", "example.com", "Example.com:8443", "*.example.com", "*.example.com:80", "under_score",
        "127.0.0.1", "10.0.0.1:8080", "::1", "2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:8080",
        "bücher.example", "例え.jp:8080",
    ),
    ORIGINS: ("*", "null", "https://chat.example.com", "http://localhost:3000", "http://[::1]:3000", "app://chat"),
    ("host",): ("127.0.0.1", "0.0.0.0", "::", "[::1]", "localhost", "my_container", "a.b-c.example", "fe80::1%eth0"),
    ("advertise_host",): ("10.0.0.2", "2001:db8::1", "worker-1.example.com"),
    ("bootstrap_url",): ("http://10.0.0.1:8998", "https://bootstrap", "http://[::1]:8998/", "http://localhost:1"),
    ADVERTISE: ("192.0.2.1", "2001:db8::1", "http://192.0.2.1:8080/path", "https://proxy.example.com"),
    PROXY: ("http://192.0.2.1:3128", "http://[2001:db8::1]:3128/", "http://192.0.2.1"),
    ENCODE: ("http://10.0.0.2:8001", "https://gpu.example.com/encode", "http://[::1]:8001"),
    LANGUAGE: ("http://10.0.0.2:8001/",),
    PREFILL: ("http://10.0.0.2:8001/",),
    DECODE: ("http://10.0.0.2:8001/",),
    METRICS: ("http://10.0.0.2:9101",),
    ZMQ: ("tcp://10.0.0.3:14750", "tcp://[::1]:14750"),
    CACHE: ("file:///var/cache/embferry", "mooncake://10.0.0.1:50051", "mooncake://10.0.0.1:50051?protocol=rdma"),
}  # fmt: skip
BAD: dict[Key, tuple[str, ...]] = {
    HOSTS: (
        "https://upload.wikimedia.org/", "upload.wikimedia.org/wikipedia", "user@example.com", "example.com:",
        "example.com.", "example.com:0", "example.com:99999", "example.com:http", "a.*.com",
        "*example.com", "**", "10.0.0.0/8", "10.0.0", "[::1", "[::1]8080", "two words", "*.", ".", "https://",
    ),
    ORIGINS: (
        "chat.example.com", "https://chat.example.com/", "https://chat.example.com/page", "https://Chat.example.com",
        "https://chat.example.com:443", "http://chat.example.com:80", "https://*.example.com", "https://",
    ),
    ("host",): ("", "http://10.0.0.1", "10.0.0.1:8000", "10.0.0", "two words", "a/b", "[10.0.0.1", "::1::"),
    ("advertise_host",): ("http://10.0.0.1:8000/", "10.0.0.1:8000", "10.0.0.256", "[::1]:80"),
    ("bootstrap_url",): (
        "foo", "10.0.0.1:8998", "http://", "http://:8998", "http://10.0.0.1:port", "http://10.0.0.1:0",
        "http://10.0.0.1:99999", "http://10.0.0.1:8998/path", "http://10.0.0.1:8998?x", "http://u:p@10.0.0.1:8998",
        "ftp://10.0.0.1", "http://10.0.0.1 :8998", "http://bücher.example",
    ),
    ADVERTISE: ("host.example.com", "192.0.2.1:8080", "http://", "http://192.0.2.1/?x", "ftp://192.0.2.1"),
    PROXY: (
        "192.0.2.1:3128", "http://proxy.example.com:3128", "https://192.0.2.1", "http://192.0.2.1/path", "no proxy",
    ),
    ENCODE: ("10.0.0.2:8001", "http://", "http://:8001", "http://10.0.0.2:x", "http://10.0.0.2/?x", "tcp://10.0.0.2:1"),
    LANGUAGE: ("foo", "http://10.0.0.2:99999"),
    PREFILL: ("foo", "http://10.0.0.2:99999"),
    DECODE: ("foo", "http://10.0.0.2:99999"),
    METRICS: ("10.0.0.2:9101", "http://10.0.0.2:99999"),
    ZMQ: ("10.0.0.3:14750", "http://10.0.0.3:14750", "tcp://10.0.0.3:14750/path", "tcp://:14750"),
    CACHE: ("/var/cache/embferry", "http://10.0.0.1", "mooncake://", "file:relative"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SOUND.items() for value in values])
def test_a_sound_value_is_taken(key: Key, value: str) -> None:
    settings = load({key: value}, {}).settings
    for part in key:
        settings = getattr(settings, part)
    assert settings in (value, (value,))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_value_without_effect_is_refused_by_the_name_of_its_option(key: Key, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({key: value}, {}, typed={key: "--as-typed"})
    (problem,) = refused.value.problems
    assert problem.startswith("--as-typed: ")
    assert problem.endswith(f"(got {value!r})")


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        (HOSTS, "https://upload.wikimedia.org/", "upload.wikimedia.org"),
        (HOSTS, "http://upload.wikimedia.org:8080/wikipedia?x=y", "upload.wikimedia.org:8080"),
        (HOSTS, "http://[2001:db8::1]:8080/", "[2001:db8::1]:8080"),
        (HOSTS, "example.com/path", "example.com"),
        (ORIGINS, "https://Chat.example.com:443/page", "https://chat.example.com"),
        (("host",), "10.0.0.1:8000", "10.0.0.1"),
        (("advertise_host",), "http://worker:8000/", "worker"),
    ],
)
def test_the_refusal_says_what_to_write(key: Key, value: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"; write {instead} (got")):
        load({key: value}, {})
    load({key: instead}, {})


def test_a_folder_is_not_a_url_and_may_begin_with_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("media", "allowed_folders")
    monkeypatch.setenv("HOME", "/home/alice")
    assert load({key: "/srv,~/pictures"}, {}).settings.media.allowed_folders == (
        Path("/srv"),
        Path("/home/alice/pictures"),
    )
    with pytest.raises(ConfigError, match="not a folder; write /srv/pictures"):
        load({key: "file:///srv/pictures"}, {})


def test_every_setting_of_hosts_and_urls_is_checked() -> None:
    named = {key for key in FIELDS if re.search("host|url|origin|proxy|zmq|advertise", key[-1])}
    names = named - {("security", "tls_check_hosts")}  # a switch
    assert {flag_name(key) for key in names} == {flag_name(key) for key in SOUND} == {flag_name(key) for key in BAD}


@pytest.mark.parametrize("command", ["encode", "language", "router"])
def test_a_bootstrap_server_that_needs_a_certificate_is_named_before_torch_is_loaded(command: str) -> None:
    words = [sys.executable, "-m", "embferry", command, "--bootstrap-url", "https://127.0.0.1:1", f"--{command}-port=0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert re.fullmatch("embferry: --bootstrap-url: .* needs a certificate: .*\n", done.stderr)


def test_a_router_warns_of_a_folder_that_is_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_process, "serve_app", AsyncMock())
    folders = (tmp_path, tmp_path / "elsewhere")
    router_process.run(Settings(media=MediaSettings(allowed_folders=folders), router=RouterSettings(port=0)))
    told = [record.getMessage() for record in caplog.records if "is not a folder" in record.getMessage()]
    assert told == [f"--media-allowed-folders: {tmp_path / 'elsewhere'} is not a folder on this machine"]
