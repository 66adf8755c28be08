"""Makes ``.venv`` and installs the project into it, at the versions of ``constraints.txt``. Only the standard library.

With ``--tests``, also the engines that some transports drive, and what the tests need of the system. Does nothing when
that has been done for the present ``pyproject.toml`` and ``constraints.txt``. Two at once wait for each other. Nothing
here names an index: pip's own settings say where packages come from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run_command import run_command
from system_packages import provide

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = {False: ("serve",), True: ("serve", "mooncake", "nixl")}
"""What is installed, without and with ``--tests``."""
STAMPS = {False: VENV / "installed", True: VENV / "installed-for-tests"}
ENGINE_LIBRARIES = f"lib/python3.{sys.version_info[1]}/site-packages/mooncake_transfer_engine_non_cuda.libs"
"""Within ``.venv``: where the Mooncake engine looks for its libraries, before it asks the system."""
INPUTS = ("pyproject.toml", "constraints.txt", "scripts/setup_env.py")
SUPPORTED = ((3, 11), (3, 12), (3, 13))


def main() -> None:
    use_supported_python()
    tests = "--tests" in sys.argv[1:]
    with alone():
        wanted = fingerprint()
        if not (STAMPS[tests].exists() and STAMPS[tests].read_text() == wanted and works()):
            make(tests, wanted)
        if tests:
            provide(VENV / ENGINE_LIBRARIES)  # each time: .venv may have come here without the system it was made on


@contextmanager
def alone() -> Iterator[None]:
    """Waits until no other process sets up."""
    lock = os.open(ROOT, os.O_RDONLY)  # the folder itself: a lock that leaves no file, and that ends with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def make(tests: bool, wanted: str) -> None:
    """Installs. What is there already and fits stays."""
    began = time.monotonic()
    print("setting up .venv: a minute or two", flush=True)
    if works():
        for stamp in STAMPS.values():
            stamp.unlink(missing_ok=True)
    else:
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], "is the venv module installed (python3-venv)?")
    project = f"{ROOT}[{','.join(EXTRAS[tests])}]"
    run(
        [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", "-e", project, *group_requirements()],
        "does pip reach a package index? its settings are PIP_* and pip.conf",
    )
    for done in {False, tests}:
        STAMPS[done].write_text(wanted)
    print(f"setting up .venv: done in {time.monotonic() - began:.0f} s", flush=True)


def use_supported_python() -> None:
    """Goes on under a Python that the project supports, if there is one."""
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
    """Changes whenever the installation would."""
    digest = hashlib.sha256(f"{ROOT} {sys.version_info[:2]}".encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works() -> bool:
    """Whether ``.venv`` is there, of this Python's version, with pip, and was not moved here from elsewhere."""
    if not PYTHON.exists():
        return False
    facts = "import sys, importlib.util as u; print(sys.version_info[:2], bool(u.find_spec('pip')), sys.prefix)"
    answer = subprocess.run([str(PYTHON), "-c", facts], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == f"{sys.version_info[:2]} True {VENV}"


def group_requirements() -> list[str]:
    """The development tools. Read here because only pip 25.1 and later know ``--group``."""
    import tomllib  # here: a Python too old for it must get as far as the message above

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return [requirement for group in groups.values() for requirement in group]


def run(command: list[str], hint: str) -> None:
    """Runs ``command``, and shows its output only if it fails; then ends the process."""
    pins = (ROOT / "constraints.txt").as_uri()
    # By environment and not by option: so it holds for what builds the package, too.
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
