"""Containers without a container engine: a root folder of its own, in name spaces of this machine's kernel.

A process sees the files of its image, the system's libraries read-only, and nothing of this checkout; it has the user,
the environment, the read-only root and the temporary file systems that a runtime would give it. This needs root, or a
kernel that lets users have name spaces. The base image is this machine's system and its Python.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.parse
import venv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from tests.deploy.dockerfile import Stage, Step, stages

ROOT = Path(__file__).parents[2]
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
BOUND = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Folders of this machine that stand for the base image; of ``/etc`` it has a copy."""
SECRET = shutil.ignore_patterns("shadow*", "gshadow*", "sudoers*", "private", "ssh", "*.key")
STEP_SECONDS = 300


def _index_folders() -> list[str]:
    """Returns the folders from which pip takes packages on this machine, besides what it takes from the network."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    words = shlex.split(listed.replace("=", " "))
    paths = [urllib.parse.urlsplit(word).path for word in words if word.startswith(("file:", "/"))]
    return sorted({path for path in paths if Path(path).is_dir()})


@dataclass
class Mounts:
    """The file system as a process sees it.

    Attributes:
        folder: The root.
        bound: Paths in it, and the files or folders of this machine that are there.
        temporary: Paths of temporary file systems in memory.
        read_only: Whether the root is.
    """

    folder: Path
    bound: dict[str, Path] = field(default_factory=dict)
    temporary: tuple[str, ...] = ()
    read_only: bool = False

    def script(self) -> str:
        """Returns the shell commands that mount it all, in a name space of their own."""
        root = str(self.folder)
        system = {path: Path(path) for path in (*BOUND, sys.base_prefix, *_index_folders()) if Path(path).exists()}
        lines = [f"mount --bind {shlex.quote(root)} {shlex.quote(root)}"]
        if self.read_only:
            lines.append(f"mount -o remount,ro,bind {shlex.quote(root)}")
        for path, source in system.items():
            lines += [f"mount --bind {shlex.quote(str(source))} {shlex.quote(root + path)}"]
            lines += [f"mount -o remount,ro,bind {shlex.quote(root + path)}"]
        local = shlex.quote(str(self.folder / "usr-local"))
        lines.append(f"mount --bind {local} {shlex.quote(root + '/usr/local')}")
        lines += [f"mount --rbind /{name} {shlex.quote(f'{root}/{name}')}" for name in ("proc", "dev", "sys")]
        lines += [f"mount -t tmpfs -o mode=1777 tmpfs {shlex.quote(root + path)}" for path in self.temporary]
        for path, source in self.bound.items():
            lines.append(f"mount --rbind {shlex.quote(str(source))} {shlex.quote(root + path)}")
        return "\n".join(lines)

    def prepare(self) -> None:
        """Makes the places to mount at."""
        system = [path for path in (*BOUND, sys.base_prefix, *_index_folders()) if Path(path).exists()]
        for path in (*system, "/proc", "/dev", "/sys", "/tmp", "/usr-local", *self.temporary):
            place = Path(str(self.folder) + path)
            place.mkdir(parents=True, exist_ok=True)
        for path, source in self.bound.items():
            place = Path(str(self.folder) + path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                place.mkdir(exist_ok=True)
            elif not place.exists():
                place.touch()


class Network:
    """A network of its own, with the loopback interface and some addresses. A context manager."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    def __enter__(self) -> Self:
        setup = ["ip link set lo up", *(f"ip addr add {address}/32 dev lo" for address in self.addresses)]
        script = "; ".join([*setup, "echo ready; exec sleep infinity"])
        self._holder = subprocess.Popen(
            ["unshare", *_as_user(), "--net", "sh", "-euc", script], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", "no network of its own: is `ip` there?"
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()

    @property
    def enter(self) -> list[str]:
        """The words before a command that runs in it."""
        return ["nsenter", "--target", str(self._holder.pid), "--net", *(["--user"] if _as_user() else []), "--"]


def _as_user() -> list[str]:
    return [] if os.geteuid() == 0 else ["--map-root-user"]


@dataclass
class Running:
    """A process in a container."""

    process: subprocess.Popen[bytes]
    log: Path
    is_told: bool = False

    def terminate(self) -> None:
        """Tells it to end, once: a second signal would end it at once."""
        if not self.is_told and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.is_told = True

    def end(self, seconds: float) -> int:
        """Ends it as a runtime does: SIGTERM, and SIGKILL after so many seconds. Returns the status."""
        self.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        self.process.kill()
        return self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")


@dataclass(frozen=True)
class Image:
    """A stage of a Dockerfile, whose steps have been run in a folder."""

    folder: Path
    stage: Stage

    @property
    def user(self) -> tuple[int, int]:
        step = self.stage.last("USER")
        user, _, group = (step.text if step else "0:0").partition(":")
        return int(user), int(group or user)

    def entry(self, command: Sequence[str] | None = None) -> list[str]:
        """Returns the words that a container runs, with a command in place of the image's own."""
        entry, default = self.stage.last("ENTRYPOINT"), self.stage.last("CMD")
        words = list(command) if command is not None else default.words if default else []
        return [*(entry.words if entry else []), *words]

    def words(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        network: Network | None = None,
        user: tuple[int, int] | None = None,
        groups: Sequence[int] = (),
        bound: Mapping[str, Path] | None = None,
        temporary: Sequence[str] = (),
        read_only: bool = False,
    ) -> list[str]:
        """Returns the whole command line of a process in a container.

        Args:
            command: Its words.
            environ: Variables besides those of the image.
            network: Where it runs; None: on this machine's network.
            user: User and group; the image's if None.
            groups: Further groups.
            bound: As in :class:`Mounts`.
            temporary: As there.
            read_only: As there.
        """
        mounts = Mounts(self.folder, dict(bound or {}), tuple(temporary), read_only)
        mounts.prepare()
        uid, gid = user or self.user
        known = {"PATH": BASE_PATH, **self.stage.environ, **environ}
        directory = next((step.text for step in reversed(self.stage.steps) if step.keyword == "WORKDIR"), "/")
        privileges = [f"--reuid={uid}", f"--regid={gid}", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        privileges.append(f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups")
        if uid == 0:
            privileges = ["--clear-groups"]
        inner = ["setpriv", *privileges, "env", "-i", "-C", directory]
        inner += [*(f"{name}={value}" for name, value in known.items()), *command]
        script = f"{mounts.script()}\nexec chroot {shlex.quote(str(self.folder))} {shlex.join(inner)}"
        spaces = ["unshare", "--mount", "--propagation", "private"]
        spaces += _as_user() if network is None else []
        return [*(network.enter if network else []), *spaces, "sh", "-euc", script]

    def run(self, command: Sequence[str], environ: Mapping[str, str] | None = None, **how: Any) -> str:
        """Runs a command to its end. Returns what it prints; fails if its status is not 0."""
        done = subprocess.run(
            self.words(command, environ or {}, **how),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=STEP_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        return done.stdout

    def start(
        self, stack: ExitStack, log: Path, command: Sequence[str], environ: Mapping[str, str], **how: Any
    ) -> Running:
        """Starts a process, which ends with the stack."""
        file: IO[bytes] = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            self.words(command, environ, **how), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        running = Running(process, log)
        stack.callback(lambda: running.kill() if process.poll() is None else None)
        return running


def build(file: Path, target: str, folder: Path, given: Mapping[str, str]) -> Image:
    """Runs the steps of a Dockerfile up to a stage, each stage in a folder of its own. Returns that stage.

    Args:
        file: The Dockerfile; its folder is the context, without what ``.dockerignore`` leaves out.
        target: The stage.
        folder: An empty folder.
        given: Build arguments.
    """
    found = stages(file.read_text(), given, {"PATH": BASE_PATH})
    images: dict[str, Image] = {}

    def made(name: str) -> Image:
        if name not in images:
            stage = found[name]
            root = folder / name
            if stage.base in found:
                shutil.copytree(made(stage.base).folder, root, symlinks=True)
            else:
                root.mkdir()
                (root / "tmp").mkdir(mode=0o1777)
                shutil.copytree("/etc", root / "etc", symlinks=True, ignore=SECRET, ignore_dangling_symlinks=True)
                venv.create(root / "usr-local", symlinks=True, with_pip=True)
            image = images[name] = Image(root, stage)
            directory = "/"
            for step in stage.steps:
                directory = step.text if step.keyword == "WORKDIR" else directory
                _run(step, image, file.parent, directory, made)
        return images[name]

    return made(target)


def _run(step: Step, image: Image, context: Path, directory: str, made: Any) -> None:
    inside = image.folder / directory.strip("/")
    if step.keyword == "WORKDIR":
        inside.mkdir(parents=True, exist_ok=True)
    elif step.keyword == "COPY":
        *sources, target = step.words
        place = image.folder / target.strip("/") if target.startswith("/") else inside / target
        origin = made(step.flags["from"]).folder if "from" in step.flags else context
        for source in sources:
            _copy(origin / source.strip("/"), place / Path(source).name if target.endswith("/") else place)
    elif step.keyword == "RUN":
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environ = {**image.stage.arguments, **pip}
        image.run(["/bin/sh", "-euc", step.text], environ, user=(0, 0))


def _copy(source: Path, target: Path) -> None:
    """Copies as COPY does: of a folder, what is in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copyfile(source, target)
