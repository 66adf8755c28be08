"""The comparison, with real processes that stand for engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from embferry.bench import machine
from embferry.bench.processes import cpu_seconds
from embferry.bench.serving import configurations, scenarios, vllm, vllm_plugins
from embferry.bench.serving.compare import Comparison
from embferry.bench.serving.engines import VLLM, Engine
from embferry.bench.serving.plugin_folder import plugin_folder
from embferry.bench.serving.results import ServingResults
from embferry.bench.serving.stack import Server, StartError, first_error, started
from embferry.bench.serving.workload import Plan

ROOT = Path(__file__).resolve().parents[3]


def test_names_choose_configurations_and_scenarios() -> None:
    def names(*only: str) -> tuple[list[str], list[str]]:
        made = Comparison("python", only)
        return [each.name for each in made.configurations], [each.name for each in made.scenarios]

    every = names()
    assert every[0] == [each.name for each in vllm.CONFIGURATIONS if each.name not in ("ours-apart", "ours-all")]
    assert every[1] == [each.name for each in vllm.SCENARIOS]
    every_of_ours = ["ours-shm", "ours-apart", "ours-all", "ours-tcp", "ours-mooncake", "ours-nixl"]
    assert names("ours-*") == (every_of_ours, every[1])
    assert names("example", "pool", "killed") == (["example"], ["killed", "pool"])
    with pytest.raises(ValueError, match=r"'pigeon'.*undivided"):
        names("pigeon")


def test_a_quick_comparison_sends_a_few_requests_of_each_scenario() -> None:
    few, all_of_them = Comparison("python", quick=True), Comparison("python")
    assert [len(each.requests()) for each in few.scenarios] == [6, 6, 16, 8, 6, 6, 2]
    assert few.total_requests < all_of_them.total_requests


def test_the_small_pool_holds_only_the_second_embedding() -> None:
    assert vllm.TOO_LARGE.tokens * configurations.TOKEN_BYTES > configurations.SMALL_POOL_BYTES
    assert scenarios.FITTING.tokens * configurations.TOKEN_BYTES <= configurations.SMALL_POOL_BYTES


@pytest.mark.parametrize("configuration", vllm.CONFIGURATIONS[1:], ids=lambda each: each.name)
def test_each_connector_has_its_settings(configuration: configurations.Configuration) -> None:
    ports = vllm.Ports(5, 9, 13)
    made = vllm.transfer(configuration, configurations.SMALL, ports, 1, Path("/store"))
    extra = made["ec_connector_extra_config"]
    assert made["ec_role"] == "ec_consumer"
    match configuration.connector:
        case "example":
            assert extra == {"shared_storage_path": "/store"}
        case "mooncake":
            assert (made["ec_port"], made["ec_buffer_size"], extra) == (9, 65536, {"mooncake_protocol": "tcp"})
        case "embferry":
            assert extra["transports"] == [configuration.transport]
            assert extra["num_blocks"] * extra["block_size"] * configurations.TOKEN_BYTES == 65536
            assert (extra["metrics_port"], extra["router"]) == (13, "http://127.0.0.1:1")


def test_plug_ins_are_found_by_a_process_with_the_folder_on_its_path(tmp_path: Path) -> None:
    where = plugin_folder(
        tmp_path, "vllm.general_plugins", vllm_plugins.idle_workers, vllm_plugins.loads_without_tokens
    )
    (described,) = metadata.distributions(path=[str(where)])
    found = {each.name: each.load() for each in described.entry_points}
    assert found == {
        "embferry-bench-idle_workers": vllm_plugins.idle_workers,
        "embferry-bench-loads_without_tokens": vllm_plugins.loads_without_tokens,
    }


@pytest.mark.integration
def test_the_cpu_time_of_a_group_is_that_of_its_threads_and_children() -> None:
    """A process and its child burn half a second each, however long that takes."""
    burn = "import time\nwhile time.process_time() < 0.5: pass\n"
    code = f"import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', {burn!r} + 'input()'], "
    code += "stdin=subprocess.PIPE)\n" + burn + "print('burnt', flush=True)\ntime.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE) as burner:
        try:
            assert burner.stdout is not None
            assert burner.stdout.readline() == b"burnt\n"
            deadline = time.monotonic() + 60
            while cpu_seconds({burner.pid}) < 0.95:  # the child has burnt its share, too
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert cpu_seconds(()) == 0
        finally:
            os.killpg(burner.pid, signal.SIGKILL)


def test_ports_are_outside_the_range_of_the_kernel() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    numbers = configurations.free_ports(13)
    assert len(set(numbers)) == 13
    assert all(1024 < number < low for number in numbers)


def test_the_last_line_of_a_traceback_is_the_reason() -> None:
    log = ["(EngineCore pid=7) ValueError: too few blocks", "later", "RuntimeError: the engine has ended"]
    assert first_error(log) == "ValueError: too few blocks"
    assert first_error(["something", "else", ""]) == "else"
    assert first_error([]) == "its log is empty"


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Returns the path of a program that stands for a Python interpreter with vLLM."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH="{ROOT}:{ROOT}/src" exec "{sys.executable}" -m tests.bench.serving.fake_engine "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Returns vLLM with scenarios of three requests; no model is made."""
    plan = Plan(requests=3, rate=50.0, max_image_tokens=64)
    made = tuple(msgspec.structs.replace(each, plan=plan, max_tokens=2) for each in vllm.SCENARIOS if each.plan)
    without_torch = types.ModuleType("tiny_qwen")
    without_torch.make = lambda folder, **sizes: folder.mkdir()  # type: ignore[attr-defined]  # a stand-in has no types
    monkeypatch.setitem(sys.modules, "embferry.models.tiny_qwen", without_torch)
    return msgspec.structs.replace(VLLM, scenarios=made)


def compared(python: str, engine: Engine, *names: str, rounds: int = 1, side_by_side: bool = False) -> ServingResults:
    comparison = Comparison(python, names, rounds=rounds, side_by_side=side_by_side, engine=engine)
    results = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES, python))
    said = []
    comparison.run(results, lambda what, more: said.append((what, more)))
    assert sum(more for _, more in said) == comparison.total_requests
    return results


@pytest.mark.integration
def test_a_configuration_that_does_not_start_is_reported_and_the_rest_goes_on(python: str, few: Engine) -> None:
    made = compared(python, few, "undivided", "ours-tcp")
    by_name = {(run.name, run.scenario): run for run in made.runs}
    whole = by_name["undivided", "Everything fits"]
    assert [sample.wrong for sample in whole.samples] == [False] * 3
    assert made.machine.versions["vllm"] == "9.9"
    assert by_name["undivided", "An encoder killed"].status == "skipped"
    failed = [run for run in made.runs if run.name == "ours-tcp"]
    assert {run.status for run in failed} == {"error"}
    assert len(failed) == 4
    assert all("ImportError: the engine is not installed" in run.reason for run in failed)


@pytest.mark.integration
def test_each_round_starts_every_configuration(python: str, few: Engine) -> None:
    made = compared(python, few, "undivided", rounds=2)
    ran = [run for run in made.runs if run.status == "ok"]
    assert [(run.scenario, run.round) for run in ran] == [
        (scenario, turn) for scenario in dict.fromkeys(run.scenario for run in ran) for turn in (1, 2)
    ]
    assert all(sample.wrong is False for run in ran for sample in run.samples)
    assert dict(made.setting)["seconds to start"].count("undivided") == 2


def test_only_scenarios_without_damage_are_measured_side_by_side() -> None:
    made = Comparison("python", side_by_side=True, rounds=3)
    assert [each.name for each in made.scenarios] == ["fits", "bursty", "again", "video"]
    few = Comparison("python", ["undivided", "ours-tcp", "video"], side_by_side=True, rounds=3)
    assert few.total_requests == 3 * 8 * (2 + 1)
    with pytest.raises(ValueError, match="only scenarios without damage"):
        Comparison("python", ["killed"], side_by_side=True)


def test_rounds_side_by_side_have_other_pixels_and_are_drawn_again() -> None:
    for scenario in (each for each in vllm.SCENARIOS if not each.damage):
        first, second = (scenario.requests(turn) for turn in (1, 2))
        keys = [{each.key for request in made for each in request.pictures} for made in (first, second)]
        assert keys[0].isdisjoint(keys[1])
        assert scenario.requests(1) == first
        drawn_again = [each.at for each in first] != [each.at for each in second]
        assert drawn_again == (scenario.plan is not None)
        sizes = [sorted(each.tokens for request in made for each in request.pictures) for made in (first, second)]
        assert scenario.plan is not None or sizes[0] == sizes[1]


def test_each_picture_is_sent_again_once() -> None:
    (again,) = [each for each in vllm.SCENARIOS if each.name == "again"]
    made = again.requests()
    assert [each.repeated for each in made] == [0, 1] * 8
    assert all(new.pictures == old.pictures for new, old in zip(made[1::2], made[::2], strict=True))


@pytest.mark.integration
def test_side_by_side_an_engine_is_started_once_and_asked_in_every_round(python: str, few: Engine) -> None:
    twin = msgspec.structs.replace(few.undivided, name="twin", title="another one, undivided")
    broken = next(each for each in few.configurations if each.name == "ours-tcp")
    engine = msgspec.structs.replace(few, configurations=(few.undivided, twin, broken))
    made = compared(python, engine, "undivided", "twin", "ours-tcp", rounds=3, side_by_side=True)
    ran = [run for run in made.runs if run.status == "ok"]
    assert made.side_by_side
    assert [(run.scenario, run.name, run.round) for run in ran] == [
        (scenario, name, turn)
        for scenario in ("Everything fits", "Bursty, half of the pictures repeated")
        for name in ("undivided", "twin")
        for turn in (1, 2, 3)
    ]
    assert all(sample.wrong is False for run in ran for sample in run.samples)
    assert len({run.samples[0].tokens for run in ran}) > 1, "rounds have other pictures, so other answers"
    assert all(run.cpu_seconds is not None and run.cpu_seconds >= 0 for run in ran)
    broke = [run for run in made.runs if run.status == "error"]
    assert [(run.name, run.round) for run in broke] == [("ours-tcp", turn) for turn in (1, 2, 3)] * 2
    started = dict(made.setting)["seconds to start"]
    assert (started.count("undivided"), started.count("twin")) == (1, 1)


class LosingStack(vllm.VllmStack):
    """After its start, a server of the twin cannot be started again."""

    def prepare(self, damage: configurations.Damage) -> None:
        if self.servers and self.configuration.name == "twin":
            if hasattr(self, "_is_up"):
                raise StartError("the router ended")
            self._is_up = True
        super().prepare(damage)


@pytest.mark.integration
def test_side_by_side_a_server_that_is_lost_costs_its_own_runs(python: str, few: Engine) -> None:
    twin = msgspec.structs.replace(few.undivided, name="twin", title="another one, undivided")
    engine = msgspec.structs.replace(few, configurations=(few.undivided, twin), stack=LosingStack)
    made = compared(python, engine, "undivided", "twin", "fits", rounds=2, side_by_side=True)
    assert [(run.name, run.round, run.reason) for run in made.runs if run.status == "error"] == [
        ("twin", turn, "the router ended") for turn in (1, 2)
    ]
    ran = [run for run in made.runs if run.status == "ok"]
    assert [(run.name, run.round) for run in ran] == [("undivided", 1), ("undivided", 2)]
    assert all(sample.wrong is False for run in ran for sample in run.samples)


@pytest.mark.integration
def test_right_answers_are_asked_for_after_the_same_engine_was_measured(
    python: str, few: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that has seen a picture before answers sooner, so the undivided one would look quicker than it is."""
    said: list[str] = []
    results = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES, python))
    comparison = Comparison(python, ["undivided", "fits"], engine=few)
    comparison.run(results, lambda what, more: said.append(what))
    assert said.index("vLLM, undivided: fits") < said.index("vLLM, undivided: right answers of fits")


@pytest.mark.integration
def test_the_comparison_fails_without_the_undivided_engine(python: str, few: Engine, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{python}" "$@"\necho "OSError: no model" >&2; exit 3\n')
    silent.chmod(0o755)
    with pytest.raises(StartError, match="OSError: no model"):
        compared(str(silent), few, "ours-tcp")


@pytest.mark.integration
def test_the_servers_have_no_cluster_key_of_the_user(
    python: str, few: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key, the router would use no instance that has one of vLLM's own connectors: they cannot prove it."""
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", "0" * 64)
    told = tmp_path / "told"
    reason = 'echo "OSError: ${EMBFERRY_CLUSTER_KEY:-no} key" >&2; exit 3'
    told.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{python}" "$@"\n{reason}\n')
    told.chmod(0o755)
    with pytest.raises(StartError, match="OSError: no key"):
        compared(str(told), few, "ours-tcp")


@pytest.mark.integration
def test_a_program_that_is_no_python_is_refused_at_once() -> None:
    for python in ("/bin/false", "/no/such/file"):
        with pytest.raises(ValueError, match=python):
            machine.describe(machine.SERVING_PACKAGES, python)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Server]:
    """Yields a server with a child; neither ends when asked to."""
    script = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); "
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    server = Server("s", [sys.executable, "-c", script + child], "http://127.0.0.1:1", tmp_path / "log", os.environ)
    deadline = time.monotonic() + 60
    while "up" not in server.lines():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield server
    server.kill()


def members(group: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[2]) == group and after_name[0] != "Z":
            found.append(int(process.name))
    return found


@pytest.mark.integration
def test_a_killed_server_leaves_no_child(sleeper: Server) -> None:
    group = sleeper.process.pid
    assert group in members(group)
    assert sleeper.alive
    assert not sleeper.is_ready()
    sleeper.kill()
    deadline = time.monotonic() + 60
    while members(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(StartError, match="s ended with -9"):
        started([sleeper], lambda what: None)


@pytest.mark.integration
def test_a_killed_server_leaves_no_shared_memory(tmp_path: Path) -> None:
    """The server has a semaphore and a segment; the process that would remove them is killed with it."""
    code = """
import time
from multiprocessing import get_context, shared_memory
lock, segment = get_context("spawn").Lock(), shared_memory.SharedMemory(create=True, size=64)
print("sem." + lock._semlock.name[1:], segment.name, "made", flush=True)
time.sleep(60)
"""
    server = Server("s", [sys.executable, "-c", code], "http://127.0.0.1:1", tmp_path / "log", os.environ)
    try:
        deadline = time.monotonic() + 60
        while "made" not in "".join(server.lines()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        names = [Path("/dev/shm") / name for name in " ".join(server.lines()).split()[:2]]
        assert all(name.exists() for name in names)
    finally:
        server.kill()
    assert not any(name.exists() for name in names)


@pytest.mark.integration
def test_a_server_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from embferry.bench.serving.stack import Server
server = Server("s", ["sleep", "60"], "http://127.0.0.1:1", Path({str(tmp_path / "log")!r}), os.environ)
while Path(f"/proc/{{server.process.pid}}/comm").read_text() != "sleep\\n":
    pass
print(server.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    starter = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert starter.returncode == -signal.SIGKILL
    pid, deadline = int(starter.stdout), time.monotonic() + 60
    while members(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.integration
def test_an_interrupted_comparison_ends_its_servers(python: str, few: Engine, tmp_path: Path) -> None:
    results = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES))
    before = set(threading.enumerate())

    def interrupt(what: str, more: int) -> None:
        if what.endswith(": fits"):
            signal.raise_signal(signal.SIGINT)

    with results.recording(tmp_path / "serve.json"):
        Comparison(python, ["undivided"], engine=few).run(results, interrupt)
    assert not results.complete
    assert set(threading.enumerate()) <= before
