"""The image: its file, and what its steps make when they are run one by one."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from embferry import __version__
from embferry.serve.config import Settings
from embferry.serve.config_load import load
from tests.deploy.containers import BASE_PATH, ROOT, Image, Network
from tests.deploy.dockerfile import stages
from tests.deploy.waiting import until

pytestmark = pytest.mark.deploy
FILE = ROOT / "Dockerfile"
STAGES = stages(FILE.read_text(), {}, {"PATH": BASE_PATH})
BUILD_TOOLS = ("pip", "pip3", "wheel", "hatch", "pyproject-build", "gcc", "cc", "g++", "make")


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(FILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["embferry", "vllm"])
def test_an_image_has_a_user_and_an_entry(name: str) -> None:
    stage = STAGES[name]
    user, entry = stage.last("USER"), stage.last("ENTRYPOINT")
    assert user is not None
    assert user.text == "10001:10001"
    assert entry is not None
    assert entry.text.startswith("["), "a shell in between would keep signals from the process"
    assert stage.environ["HF_HOME"] == "/cache/huggingface"
    after = stage.steps[stage.steps.index(user) :]
    assert not [step for step in after if step.keyword in ("RUN", "COPY", "ADD")]


def test_the_last_stage_is_the_image_and_it_only_copies() -> None:
    assert list(STAGES)[-1] == "embferry"
    stage = STAGES["embferry"]
    assert stage.base == STAGES["environment"].base == STAGES["wheel"].base, (
        "the Python of the environment is its base's"
    )
    assert [(step.flags, step.text) for step in stage.steps if step.keyword == "COPY"] == [
        ({"from": "environment"}, "/embferry /embferry")
    ]
    runs = " ".join(step.text for step in stage.steps if step.keyword == "RUN")
    assert not re.search(r"\b(install (?!-d)|apt-get|apk)\b", runs)


def test_the_vllm_of_the_image_is_the_one_that_the_connector_is_tested_with() -> None:
    import setup_vllm

    assert STAGES["vllm"].base == f"vllm/vllm-openai:v{setup_vllm.VERSION.partition('+')[0]}"


def test_the_context_has_what_the_steps_copy_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word.removeprefix("./")
        for stage in STAGES.values()
        for step in stage.steps
        if step.keyword == "COPY" and "from" not in step.flags
        for word in step.words[:-1]
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)
    assert not [name for name in (".env", ".git", ".venv", "tests") if any(fnmatch.fnmatch(name, one) for one in kept)]


def test_the_image_runs_as_its_user_on_a_root_that_cannot_be_written(image: Image) -> None:
    how = {"read_only": True, "temporary": ["/tmp"]}
    assert image.run(image.entry(["--version"]), **how).strip() == f"embferry {__version__}"
    told = image.run(
        ["sh", "-c", "id -u; id -g; touch /embferry/x /x /home/embferry/x 2>&1; touch /tmp/x && echo fine"], **how
    )
    assert told.split()[:2] == ["10001", "10001"]
    assert told.count("Read-only file system") == 3
    assert told.endswith("fine\n")


def test_the_image_has_no_build_tools_and_no_checkout(image: Image) -> None:
    found = sorted(
        path.name for folder in ("embferry/bin", "usr-local/bin") for path in (image.folder / folder).iterdir()
    )
    assert not {name for name in found if name.startswith("pip")} | {*BUILD_TOOLS} & {*found}
    program = "import importlib.metadata as m; print(*sorted({d.name.lower() for d in m.distributions()}))"
    installed = {*image.run(["/embferry/bin/python", "-c", program]).split()}
    assert {"embferry", "torch", "typer", "opentelemetry-sdk"} <= installed
    assert not {"pip", "wheel", "hatchling", "build", "pytest", "mypy"} & installed  # torch needs setuptools
    here = image.run(["/embferry/bin/python", "-c", "import embferry; print(embferry.__file__)"]).strip()
    assert here.startswith("/embferry/lib/")
    assert not (image.folder / "source").exists()


def test_versions_in_the_image_are_those_of_constraints(image: Image) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}
    program = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    for line in image.run(["/embferry/bin/python", "-c", program]).split():
        name, _, version = line.partition("==")
        if name != "embferry":
            assert version.partition("+")[0] == pinned[normal(name)], name


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_variables_of_the_image_are_settings(image: Image) -> None:
    own = {name: value for name, value in image.stage.environ.items() if name.startswith("EMBFERRY_")}
    assert load({}, own).settings == Settings(host="0.0.0.0").with_places({"host": "EMBFERRY_HOST"})


def test_a_container_serves_by_itself_and_its_health_check_says_so(image: Image, tmp_path: Path) -> None:
    """``docker run -e EMBFERRY_ROUTER_API_KEY=… embferry``."""
    check = image.stage.last("HEALTHCHECK")
    assert check is not None
    command = re.search(r"CMD (\[.*\])$", check.text)
    assert command is not None
    words = json.loads(command[1])
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        how = {"network": network, "read_only": True, "temporary": ["/tmp", "/cache"]}
        environ = {"EMBFERRY_ROUTER_API_KEY": "a-key-of-this-test"}
        running = image.start(stack, tmp_path / "log", image.entry(), environ, **how)

        def is_well() -> bool:
            assert running.process.poll() is None, running.text
            return subprocess.run(image.words(words, {}, **how), capture_output=True, check=False).returncode == 0

        until(is_well)
        assert running.end(30) == 0, running.text


def test_a_container_without_an_api_key_says_what_to_do(image: Image, tmp_path: Path) -> None:
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        running = image.start(stack, tmp_path / "log", image.entry(), {}, network=network, temporary=["/tmp"])
        assert running.process.wait(120) == 2
        assert "EMBFERRY_ROUTER_API_KEY" in running.text
