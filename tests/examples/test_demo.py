"""The demo's last lines, which are to be pasted: they name what is there, from every folder."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))  # as it is for the script
    spec = importlib.util.spec_from_file_location("embferry_demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["embferry_demo"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return module


@pytest.mark.parametrize("folder", [ROOT, ROOT / "examples", ROOT / "docs", Path("/")])
def test_the_lines_to_paste_name_files_that_are_there(
    folder: Path, demo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for question in demo.questions():
        serve, ask = map(shlex.split, demo.commands(question))
        program, verb, verbose, picture, text = ask
        assert serve == [program, "serve"]
        assert (verb, verbose, text) == ("ask", "-v", question.text)
        assert (folder / picture).samefile(question.media[0])
        assert Path(picture).is_absolute() == (folder == ROOT / "docs")
        assert (folder / program).parent == Path(sys.executable).parent
