"""Names of the Hugging Face Hub: downloaded from a server that stands for it, or refused with what to do."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from embferry.models import hub, model_path
from embferry.plan.errors import ModelUnknown
from embferry.plan.files import read_model

NAME = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that downloads use. ``files``: by name. ``refusal``: a header's value, or empty."""

    files: dict[str, bytes]
    asked: list[str]
    refusal = ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        self.asked.append(f"{self.command} {path}")
        if self.refusal:
            status = {"GatedRepo": 403, "RepoNotFound": 404}.get(self.refusal, 500)
            self._send(status, b"{}", {"X-Error-Code": self.refusal, "X-Error-Message": "no"})
        elif "/resolve/" in path and name in self.files:
            content = self.files[name]
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(200, json.dumps(entries).encode(), {})
        elif "/revision/" in path or path == f"/api/models/{NAME}":
            siblings = [{"rfilename": name} for name in self.files]
            self._send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), {})
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with the packaged model under another name, and an empty cache."""
    packaged = model_path("shapes")
    files = {path.name: path.read_bytes() for path in packaged.iterdir() if path.is_file()}
    files["pytorch_model.bin"] = b"pickle"

    class One(Hub):
        asked: list[str] = []  # noqa: RUF012

    One.files = files
    server = ThreadingHTTPServer(("127.0.0.1", 0), One)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    import huggingface_hub.constants as constants

    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the sets with engines turn it on
    yield One
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_once_and_found_by_its_name(served: type[Hub]) -> None:
    said: list[str] = []
    directory = hub.download(NAME, said.append)
    assert said == [f"downloading {NAME} from the Hugging Face Hub"]
    assert (directory / "model.safetensors").read_bytes() == served.files["model.safetensors"]
    assert not (directory / "pytorch_model.bin").exists()
    served.asked.clear()
    assert hub.cached(NAME) == model_path(NAME) == directory
    assert served.asked == []  # a worker needs no network


def test_a_plan_downloads_the_settings_alone(served: type[Hub]) -> None:
    served.files["config.json"] = served.files["config.json"].replace(b"qwen", b"other")
    assert read_model(NAME).tokens(128, 128) == 64
    assert not [asked for asked in served.asked if "safetensors" in asked or "tokenizer" in asked]


def test_a_plan_says_as_a_server_does_that_a_model_cannot_be_downloaded(
    served: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnknown, match=r"cannot be downloaded: .*hf download owner/tiny --local-dir DIR"):
        read_model(NAME)


def test_a_model_of_another_family_is_refused_before_its_weights_are_downloaded(served: type[Hub]) -> None:
    served.files["config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(ValueError, match="bert is not supported; qwen2_vl"):
        hub.download(NAME, lambda sentence: None)
    assert not [asked for asked in served.asked if "safetensors" in asked]


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ("GatedRepo", "asks for its terms to be accepted; accept them there and set HF_TOKEN"),
        ("RepoNotFound", f"has no model {NAME} that this machine may see; check its name, or set HF_TOKEN"),
    ],
)
def test_a_refusal_says_what_to_do(served: type[Hub], refusal: str, sentence: str) -> None:
    served.refusal = refusal
    with pytest.raises(ValueError, match=sentence):
        hub.download(NAME, lambda sentence: None)


def test_without_a_network_the_sentence_says_what_to_do(served: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be downloaded: .*hf download owner/tiny --local-dir DIR"):
        hub.download(NAME, lambda sentence: None)


def test_a_hub_that_cannot_be_reached_is_told_with_the_reason(
    served: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ValueError, match=r"cannot be downloaded: ConnectError: .*refused; try again, or download it"):
        hub.download(NAME, lambda sentence: None)


def test_without_huggingface_hub_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub.cached(NAME) is None
    with pytest.raises(ValueError, match="pip install huggingface_hub; or download it elsewhere"):
        hub.download(NAME, lambda sentence: None)


@pytest.mark.parametrize("name", ["", "shapes", "/data/model", "./a/b", "a/b/c", "../b", "a/", "a b/c"])
def test_paths_are_no_names_of_the_hub(name: str) -> None:
    assert not hub.is_hub_name(name)


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-2B-Instruct", "a/b_c.d-e"])
def test_names_of_the_hub(name: str) -> None:
    assert hub.is_hub_name(name)
