"""The files of ``embferry ask``: bounded before they are read, and sent as what their bytes are."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from PIL import Image

from embferry.cli.ask_files import MAX_BYTES, Files
from embferry.cli.ask_words import content, part
from embferry.serve.config import MIB
from tests.serve import pictures
from tests.serve.test_cli import called

LIMIT = 1000


def refused(read: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the sentence with which a file is refused."""
    with pytest.raises(typer.Exit) as ended:
        read()
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


class Endless(io.RawIOBase):
    """A file that never ends. ``nbytes``: those that were read."""

    nbytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        self.nbytes += len(buffer)
        buffer[:] = b"x" * len(buffer)
        return len(buffer)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "large.mp4"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # more than any machine could read
    assert refused(lambda: part(str(file)), capsys) == (
        f"embferry: {file} has 1,099,511,627,776 bytes; the limit is 33,554,432 "
        "(media.max_bytes of the router, --max-bytes here)"
    )


def test_files_that_grow_are_read_up_to_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    # A regular file of 0 bytes that has more.
    assert "/proc/self/status has more than 10 bytes; the limit is 10" in refused(
        lambda: Files(10).read("/proc/self/status"), capsys
    )


@pytest.mark.parametrize("words", [("-", "what?"), ("-",)])
def test_standard_input_without_an_end_is_read_up_to_the_limit(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(endless)))
    assert "standard input has more than" in refused(lambda: content([*words], Files(LIMIT)), capsys)
    assert endless.nbytes < (LIMIT + MIB if len(words) == 2 else 32 * MIB)


def test_the_files_of_a_question_have_a_limit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "half"
    file.write_bytes(b"x" * (MAX_BYTES // 2))
    words = [str(file)] * 9
    assert content([*words[:8], "what?"])
    sentence = refused(lambda: content([*words, "what?"]), capsys)
    assert sentence == f"embferry: {file}: all files together have more than 134,217,728 bytes"


def test_the_limit_can_be_raised_as_the_routers(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    with file.open("wb") as opened:
        opened.truncate(MAX_BYTES + 1)
    where = ("--url", "http://127.0.0.1:9")
    assert called("ask", str(file), "what?", *where)[0] == 2
    for more in ({"words": ("--max-bytes", "40000000")}, {"environ": {"EMBFERRY_MEDIA_MAX_BYTES": "40000000"}}):
        status, _, err = called("ask", str(file), "what?", *where, *more.get("words", ()), **more.get("environ", {}))
        assert (status, "no server responds" in err) == (1, True)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "pipe of the shell"])
def test_what_is_no_regular_file_is_refused_at_once(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    reader, writer = os.pipe()
    name = {"device": "/dev/zero", "pipe of the shell": f"/dev/fd/{reader}"}.get(kind, kind)
    try:
        sentence = refused(lambda: part(name), capsys)
    finally:
        os.close(reader)
        os.close(writer)
    if kind == "folder":
        assert sentence == "embferry: folder is a folder; name the files in it"
    else:
        assert sentence == (
            f"embferry: {name} is no regular file; give its bytes to standard input: embferry ask - ... < {name}"
        )


def animation(form: str, frames: int) -> bytes:
    """Returns an animation in one of the formats of pictures."""
    images = [Image.new("RGB", (64, 64), (60 * number, 0, 0)) for number in range(frames)]
    data = io.BytesIO()
    images[0].save(data, form, save_all=True, append_images=images[1:], duration=100)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        pytest.param(pictures.png(), "image", id="PNG"),
        pytest.param(pictures.video(3), "video", id="MP4"),
        *(
            pytest.param(animation(form, frames), "video" if frames > 1 else "image", id=f"{form} of {frames}")
            for form in ("GIF", "WEBP", "PNG")
            for frames in (1, 2, 5)
        ),
        pytest.param(animation("TIFF", 2), "image", id="TIFF of 2"),
        pytest.param(animation("GIF", 2)[:60], "image", id="cut GIF"),
        pytest.param(b"GIF89a", "image", id="beginning of a GIF"),
    ],
)
@pytest.mark.parametrize("name", ["a", "a.png", "a.mp4", "a.gif", "a.tmp"])
def test_a_file_is_sent_as_what_its_bytes_are(data: bytes, kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert part(str(tmp_path / name))["type"] == f"{kind}_url"


@pytest.mark.parametrize(("name", "kind"), [("a.mp4", "video"), ("a.mkv", "video"), ("a.png", "image"), ("a", "image")])
def test_bytes_of_no_known_format_go_by_the_name(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something else")
    assert part(str(tmp_path / name))["type"] == f"{kind}_url"


def test_formats_are_known_without_a_decoder() -> None:
    code = (
        "import sys, embferry.cli.ask\n"
        "heavy = {'torch', 'transformers', 'av', 'PIL', 'httpx', 'starlette', 'uvicorn', 'numpy', 'zmq'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
