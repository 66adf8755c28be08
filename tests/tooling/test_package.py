"""The wheel and the sdist: what they hold, and that they work where nothing else is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from embferry import __version__

pytestmark = pytest.mark.package
ROOT = Path(__file__).parents[2]
CORE = {"embferry", "numpy", "msgspec", "xxhash", "h11"}
GUARD = 300
NEEDED = [
    "py.typed",
    "library.py",
    "serve/page/index.html",
    "serve/page/page.js",
    "serve/page/style.css",
    "serve/page/icon.svg",
    "models/example.png",
    "models/shapes/config.json",
    "models/shapes/model.safetensors",
    "models/shapes/tokenizer.json",
]
"""Files that nothing imports, and one that is imported."""
UNWANTED = re.compile(
    r"(^|/)(tests?|docs|scripts|examples|training|__pycache__|\.[^/]+_cache)/|\.py[co]$|\.safetensors\.tmp$"
)


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, without pip.

    Attributes:
        folder: The folder.
        home: An empty folder, in which commands run.
    """

    folder: Path
    home: Path

    def install(self, *what: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python"), "install", "--quiet"]
        command += ["--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt"), *what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment as a user would, with nothing of this checkout in sight."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EMBFERRY"))}
        command = [str(self.folder / "bin" / program), *words]
        return subprocess.run(
            command,
            cwd=self.home,
            env=known | {"HOME": str(self.home), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=GUARD,
            check=False,
        )


def environment(folder: Path, what: Sequence[str]) -> Environment:
    """Makes an environment and installs something into it."""
    venv.create(folder / "env", with_pip=False)
    (folder / "home").mkdir()
    made = Environment(folder / "env", folder / "home")
    made.install(*what)
    return made


@dataclass(frozen=True)
class Built:
    """The two files."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    builder = environment(tmp_path_factory.mktemp("builder"), ["build", "hatchling"])
    done = builder.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        f"embferry-{__version__}-py3-none-any.whl",
        f"embferry-{__version__}.tar.gz",
    ]
    return Built(*sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def library(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, without extras."""
    return environment(tmp_path_factory.mktemp("library"), [str(built.wheel)])


@pytest.fixture(scope="module")
def router(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and the command line."""
    return environment(tmp_path_factory.mktemp("router"), [f"{built.wheel}[router]"])


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"embferry", f"embferry-{__version__}.dist-info"}
    assert {f"embferry/{name}" for name in NEEDED} <= set(names)
    sources = {f"embferry/{path.relative_to(ROOT / 'src/embferry')}" for path in (ROOT / "src/embferry").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert not [name for name in names if UNWANTED.search(name.removeprefix("embferry/testing/"))]


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"} <= names
    assert {f"src/embferry/{name}" for name in NEEDED} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"src"}
    assert not [name for name in names if UNWANTED.search(name)]


def installed(where: Environment) -> set[str]:
    """Returns the names of the packages in an environment."""
    program = "import importlib.metadata as m; print(*sorted({d.name.lower() for d in m.distributions()}))"
    return set(where.run("python", "-c", program).stdout.split())


def example() -> str:
    """Returns the first program of docs/library.md."""
    found = re.search(
        r"^```python\n(.*?)^```$", (ROOT / "docs/library.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found is not None
    return found[1]


def check_library(where: Environment) -> None:
    """Checks an environment without extras: what is in it, and a transfer between two managers over loopback."""
    assert installed(where) == CORE
    done = where.run("python", "-c", example())
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"1000 tokens in \d+ transfers; equal: True\n", done.stdout)
    done = where.run("embferry", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"embferry {__version__}\n", "")


def test_the_wheel_alone_is_the_library(library: Environment) -> None:
    check_library(library)


def test_the_sdist_can_be_installed_as_well(built: Built, tmp_path: Path) -> None:
    check_library(environment(tmp_path, [str(built.sdist)]))


def test_without_the_command_line_the_help_says_what_to_install(library: Environment) -> None:
    done = library.run("embferry", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for extra in ("router", "top", "serve"):
        assert f"pip install 'embferry[{extra}]'" in done.stdout


@pytest.mark.parametrize(
    ("verb", "extra"),
    [("router", "router"), ("ask", "router"), ("serve", "serve"), ("encode", "serve"), ("top", "top")],
)
def test_without_the_command_line_a_command_says_what_to_install(library: Environment, verb: str, extra: str) -> None:
    done = library.run("embferry", verb)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"embferry: typer is not installed; install it with: pip install 'embferry[{extra}]'\n"


def test_with_the_command_line_there_is_help_and_no_torch(router: Environment) -> None:
    assert installed(router) > CORE
    assert not {"torch", "transformers", "textual"} & installed(router)
    assert router.run("embferry", "--version").stdout == f"embferry {__version__}\n"
    done = router.run("embferry", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("serve", "router", "ask", "status", "top", "bench"):
        assert re.search(rf"^ +{verb} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("encode",), "serve"),
        (("top",), "top"),
        (("migrate", "."), "migrate"),
        (("keys", "ca", "ca"), "tls"),
        (("bench", "transfer"), "bench"),
    ],
)
def test_a_command_whose_extra_is_missing_names_it(router: Environment, words: tuple[str, ...], extra: str) -> None:
    done = router.run("embferry", *words)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"pip install 'embferry[{extra}]'" in " ".join(done.stderr.split())
