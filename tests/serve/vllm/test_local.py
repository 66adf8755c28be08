"""``embferry serve --engine vllm`` and ``embferry router --engine vllm`` as processes, with a fake vllm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.connectors.vllm.config import parse
from tests.serve.vllm.stubs import picture, request, text

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 300.0
EMBFERRY = (sys.executable, "-c", "from embferry.cli.main import run; run()")


class Running:
    """The command under test. ``log``: its standard error; ``notes``: one for each start of vllm."""

    def __init__(self, folder: Path, *words: str, vllm: bool = True, **environ: str) -> None:
        self._folder = folder
        self._log, self._notes = folder / "log", folder / "notes"
        self._notes.touch()
        if vllm:
            fake = folder / "vllm"
            fake.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "serve" / "vllm" / "fake_vllm.py").read_text())
            fake.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBFERRY_")}
        environ = {**kept, **environ, "PATH": f"{folder}:/usr/bin:/bin", "FAKE_VLLM_NOTES": str(self._notes)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*EMBFERRY, *words], stderr=log, env=environ, start_new_session=True)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._notes.read_text().splitlines()]

    @property
    def url(self) -> str:
        found = re.search(r"ready: \S+ at (http://\S+)/v1", self.log)
        assert found
        return found[1]

    def pid(self, name: str) -> int:
        """Returns the process of this name that was started last."""
        return int(re.findall(rf"{name} is starting \(pid (\d+)\)", self.log)[-1])

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE
        while True:
            has_ended = self.process.poll() is not None
            if condition():  # also if it became true in the last moment of the process
                return
            assert not has_ended, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for note in self.notes:
            Path("/dev/shm", note["shared"]).unlink(missing_ok=True)
            for pid in pids(note):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def pids(note: dict[str, Any]) -> set[int]:
    """Returns the processes of one start of vllm."""
    return {note["pid"], note["engine"], *note.get("more", ())}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(*words: str, **more: Any) -> Running:
        started.append(Running(tmp_path, *words, **more))
        return started[-1]

    yield begin
    for one in started:
        one.close()


def ask(url: str, *content: Any) -> httpx.Response:
    body = {**request(*content), "model": "model"}
    with httpx.Client(verify=False, trust_env=False, timeout=DEADLINE) as client:
        return client.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer k"})


def connector_ports(one: Running) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the ports of the connectors' metrics by the URL of each instance: as it was told, and as ``/sd`` says."""
    told = {}
    for note in one.notes:
        words = note["arguments"]
        transfer = json.loads(words[words.index("--ec-transfer-config") + 1])
        port = words[words.index("--port") + 1]
        told[f"http://127.0.0.1:{port}"] = transfer["ec_connector_extra_config"]["metrics_port"]
    groups = httpx.get(f"{one.url}/sd", headers={"Authorization": "Bearer k"}, timeout=DEADLINE, trust_env=False).json()
    found = [group for group in groups if group["labels"]["part"] == "connector"]
    assert all(group["targets"][0].startswith("127.0.0.1:") for group in found)
    return told, {group["labels"]["worker"]: int(group["targets"][0].rpartition(":")[2]) for group in found}


SERVE = ("serve", "--engine", "vllm", "--model", "some/model", "--port", "0")


def test_instances_and_router_start_restart_and_end(start: Callable[..., Running]) -> None:
    more = ("--encoders", "2", "--transports", "tcp", "--restart-delay", "0.1")
    more += ("--cache", "file:///var/cache/embferry", "--cache-max-bytes", "1000")
    cache = {"url": "file:///var/cache/embferry", "max_bytes": 1000, "lookup_timeout": 1}
    one = start(*SERVE, *more, "--", "--dtype", "float32", EMBFERRY_ROUTER_API_KEY="k")
    one.wait(lambda: "ready:" in one.log)
    notes = one.notes
    assert len(notes) == 3
    for note in notes:
        assert note["key"] == "k"
        words = note["arguments"]
        assert words[:4] == ["serve", "some/model", "--served-model-name", "model"]
        assert words[-2:] == ["--dtype", "float32"]
        transfer = json.loads(words[words.index("--ec-transfer-config") + 1])
        extra = transfer.pop("ec_connector_extra_config")
        assert extra.pop("transports") == ["tcp"]
        assert extra.pop("metrics_port") > 0
        parse(extra)  # the connector takes it
        assert extra == ({"router": one.url} if transfer["ec_role"] == "ec_consumer" else {"cache": cache})
        assert transfer["ec_connector_module_path"] == "embferry.connectors.vllm.connector"
    told, found = connector_ports(one)
    assert len(told) == 3
    assert found == told
    answer = ask(one.url, picture(), text()).json()
    assert answer["asked"]["messages"][0]["content"][0]["type"] == "image_embeds"

    assert {note["offline"] for note in notes} == {os.environ.get("HF_HUB_OFFLINE", "0")}  # it may download the model
    (language,) = (note for note in notes if "--enable-mm-embeds" in note["arguments"])
    assert answer["choices"][0]["message"]["content"] == str(language["pid"])
    os.kill(language["pid"], signal.SIGKILL)
    one.wait(lambda: len(one.notes) == 4)
    one.wait(
        lambda: (
            httpx.get(f"{one.url}/ready", timeout=DEADLINE, trust_env=False).json()["workers"]
            == {"encode": 2, "language": 1}
        )
    )
    assert ask(one.url, picture()).json()["choices"][0]["message"]["content"] == str(one.notes[3]["pid"])
    assert not alive(language["engine"])
    folders = [Path(note["folder"]) for note in one.notes]
    assert folders[3] == Path(language["folder"])
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)  # also that of the second start

    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(DEADLINE) == 0
    assert "all processes have ended" in one.log
    assert "Traceback" not in one.log
    last = one.log.partition("ending; Ctrl-C again ends at once\n")[2]
    assert [line for line in last.splitlines() if " info " not in line or "leaked" in line] == []  # vLLM about its end
    assert not any(folder.parent.exists() for folder in folders)
    assert re.search(r" error +encode-1\[\d+\] vllm: ERROR 11-29 a line of vLLM", one.log)
    assert [pid for note in one.notes for pid in (note["pid"], note["engine"]) if alive(pid)] == []


def test_prefill_and_decode_instances_take_the_place_of_language_instances(start: Callable[..., Running]) -> None:
    one = start(*SERVE, "--prefills", "1", "--decodes", "2", EMBFERRY_ROUTER_API_KEY="k")
    one.wait(lambda: "ready:" in one.log)
    found: dict[str, list[Any]] = {"ec_producer": [], "kv_producer": [], "kv_consumer": []}
    for note in one.notes:
        words = note["arguments"]
        role = json.loads(words[words.index("--ec-transfer-config") + 1])["ec_role"]
        if "--kv-transfer-config" in words:
            transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
            assert (role, transfer["kv_connector"]) == ("ec_consumer", "NixlConnector")
            assert "--enable-mm-embeds" in words
            role = transfer["kv_role"]
        found[role].append(note)
    assert [len(notes) for notes in found.values()] == [1, 1, 2]
    assert len({note["kv_port"] for note in one.notes}) == 4
    told, listed = connector_ports(one)
    assert len(told) == 4
    assert listed == told
    workers = httpx.get(f"{one.url}/ready", timeout=DEADLINE, trust_env=False).json()["workers"]
    assert workers == {"encode": 1, "prefill": 1, "decode": 2}
    answer = ask(one.url, picture(), text()).json()
    assert answer["choices"][0]["message"]["content"] in [str(note["pid"]) for note in found["kv_consumer"]]
    assert answer["asked"]["kv_transfer_params"] == {"do_remote_prefill": True}
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(DEADLINE) == 0


def test_shared_memory_of_an_engine_that_had_to_be_killed_is_removed(start: Callable[..., Running]) -> None:
    one = start(*SERVE, "--", "--deaf-engine")
    one.wait(lambda: "ready:" in one.log)
    files = [Path("/dev/shm") / note["shared"] for note in one.notes]
    assert len(files) == 2
    assert all(file.exists() for file in files)
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(DEADLINE) == 0
    assert not any(alive(note["engine"]) for note in one.notes)
    assert not any(file.exists() for file in files)


MOMENTS = ("engine", *(pytest.param(one, marks=pytest.mark.sweeps) for one in ("first", "orphan", "bound", "ready")))


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGINT SIGINT", "SIGINT, and its own process is killed"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_that_vllm_has_started_outlives_an_end_at_any_moment(
    moment: str, how: str, start: Callable[..., Running]
) -> None:
    import psutil

    one = start(*SERVE, "--", "--deaf-at", moment)
    one.wait(lambda: len(one.notes) == 2 and (moment != "ready" or "ready:" in one.log))
    started = {child.pid for child in psutil.Process(one.process.pid).children(recursive=True)}
    assert set().union(*map(pids, one.notes)) <= started
    one.process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
    one.wait(lambda: "ending" in one.log)
    if how == "SIGINT SIGINT":
        one.process.send_signal(signal.SIGINT)
    if "killed" in how:
        for name in ("encode-0", "language-0"):
            os.kill(one.pid(name), signal.SIGKILL)
    assert one.process.wait(DEADLINE) == 0
    assert one.log.splitlines()[-1].endswith("all processes have ended")
    assert "Traceback" not in one.log
    assert [pid for pid in started if alive(pid)] == []
    assert [note["shared"] for note in one.notes if Path("/dev/shm", note["shared"]).exists()] == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_left_of_an_instance_whose_own_process_was_killed(
    moment: str, start: Callable[..., Running]
) -> None:
    one = start(*SERVE, "--restart-delay", "0.1", "--", "--deaf-at", moment)
    one.wait(lambda: len(one.notes) == 2 and (moment != "ready" or "ready:" in one.log))
    left = one.notes
    for name in ("encode-0", "language-0"):
        os.kill(one.pid(name), signal.SIGKILL)
    if moment == "ready":  # they are started again
        one.wait(lambda: len(one.notes) == 4)
        assert all(len(list(Path(note["folder"]).iterdir())) == 1 for note in one.notes)
    else:
        assert one.process.wait(DEADLINE) == 1
        assert not any(Path(note["folder"]).parent.exists() for note in left)
        assert "ended with signal SIGKILL before it answered" in one.log.splitlines()[-1]
    assert [pid for note in left for pid in pids(note) if alive(pid)] == []
    assert [note["shared"] for note in left if Path("/dev/shm", note["shared"]).exists()] == []


def test_an_answer_under_way_is_finished_before_the_instances_end(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    one = start(*SERVE, FAKE_VLLM_HOLD=str(tmp_path))
    one.wait(lambda: "ready:" in one.log)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(ask, one.url, text())
        one.wait((tmp_path / "asked").exists)
        one.process.send_signal(signal.SIGINT)
        one.wait(lambda: "ending" in one.log)
        (tmp_path / "answer").touch()
        assert answer.result().json()["choices"][0]["finish_reason"] == "stop"
    assert one.process.wait(DEADLINE) == 0


def test_without_a_model_the_packaged_one_is_served(start: Callable[..., Running]) -> None:
    one = start("serve", "--engine", "vllm", "--port", "0")
    one.wait(lambda: "ready:" in one.log)
    for note in one.notes:
        words = note["arguments"]
        assert (Path(words[1]) / "config.json").is_file()
        assert words[2:4] == ["--served-model-name", "shapes"]
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(DEADLINE) == 0


@pytest.mark.parametrize(
    ("model", "more", "name"),
    [
        ("some/model", (), "model"),
        ("some/model", ("--config", "vllm.yaml"), "mine"),
        *(
            pytest.param(*case, marks=pytest.mark.sweeps)
            for case in (
                ("../tiny25", (), "tiny25"),
                ("shapes", (), "shapes"),
                ("some/model", ("--served-model-name", "mine", "other", "--dtype", "float32"), "mine"),
                ("some/model", ("--served_model_name=mine",), "mine"),
                ("some/model", ("--served-model-name", "first", "--served-model-name", "mine"), "mine"),
            )
        ),
    ],
)
def test_the_shown_commands_name_the_model_as_vllm_serves_it(
    model: str, more: tuple[str, ...], name: str, start: Callable[..., Running], tmp_path: Path
) -> None:
    (tmp_path / "vllm.yaml").write_text("dtype: float32\nserved_model_name: [mine, other]\n")
    more = tuple(str(tmp_path / word) if word.endswith("yaml") else word for word in more)
    one = start("serve", "--engine", "vllm", "--model", model, "--port", "0", *(("--", *more) if more else ()))
    one.wait(lambda: "curl -sS" in one.log)
    assert httpx.get(f"{one.url}/v1/models", timeout=DEADLINE, trust_env=False).json()["data"][0]["id"] == name
    (line,) = re.findall(r"or: (curl .*)", one.log)
    done = subprocess.run(["bash", "-c", f"{line} --noproxy '*'"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["asked"]["model"] == name
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(DEADLINE) == 0


def test_no_process_outlives_a_killed_supervisor(start: Callable[..., Running]) -> None:
    one = start(*SERVE)
    one.wait(lambda: "ready:" in one.log)
    one.process.kill()
    one.process.wait()
    deadline = time.monotonic() + DEADLINE
    while any(alive(note[which]) for note in one.notes for which in ("pid", "engine")):
        assert time.monotonic() < deadline, one.log
        time.sleep(0.05)
    while any(Path(note["folder"]).parent.exists() for note in one.notes):
        assert time.monotonic() < deadline, one.log
        time.sleep(0.05)


def test_a_vllm_that_cannot_start_ends_everything(start: Callable[..., Running]) -> None:
    one = start(*SERVE, "--", "--end-at-once")
    assert one.process.wait(DEADLINE) == 1
    last = one.log.splitlines()[-1]
    assert re.match(r"embferry: (encode|language)-0 cannot start: vllm serve ended with status 1: ", last)
    assert last.endswith("RuntimeError: no device")
    assert "Traceback" not in one.log


def test_a_missing_vllm_is_reported(start: Callable[..., Running]) -> None:
    one = start(*SERVE, vllm=False)
    assert one.process.wait(DEADLINE) == 1
    assert one.log.startswith("embferry: there is no vllm beside")


def test_the_router_starts_and_ends_without_instances(start: Callable[..., Running]) -> None:
    closed = "http://127.0.0.1:9"
    one = start("router", "--engine", "vllm", "--encode-urls", closed, "--language-urls", closed, "--port", "0")
    one.wait(lambda: "router listens on" in one.log)
    found = re.search(r"router listens on (\S+)", one.log)
    assert found
    answer = ask(found[1], picture())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(DEADLINE) == 0
    assert "Traceback" not in one.log
