"""A process that cannot start gives its supervisor one sentence for every kind of error."""

from __future__ import annotations

import types

import pytest

from embferry.protocol.errors import TransportError
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.supervisor import child


class Pipes:
    """A supervisor's pipes. ``told``: the reasons."""

    def __init__(self, reported: bool) -> None:
        self.reported = reported
        self.told: list[str] = []

    def first_line(self) -> bytes:
        return b""

    def on_supervisor_end(self, action: object) -> None:
        pass

    def report(self, url: str) -> None:
        self.reported = True

    def fail(self, reason: str) -> None:
        self.told.append(reason)


def failed(
    error: Exception, role: str, monkeypatch: pytest.MonkeyPatch, *, level: str = "info", reported: bool = False
) -> list[str]:
    """Returns what the supervisor is told by a process that ends with an error."""

    def run(settings: Settings, report: object) -> None:
        raise error

    pipes = Pipes(reported)
    monkeypatch.setattr(child, "SupervisorPipes", lambda: pipes)
    monkeypatch.setattr(child, "unpack", lambda line: Settings(log_level=level))
    monkeypatch.setattr(child, "configure", lambda *words: None)
    monkeypatch.setattr(child.security, "apply", lambda settings: None)
    monkeypatch.setattr(child, "_bootstrap", run)
    loader = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=run))
    monkeypatch.setattr(child, "importlib", loader)
    monkeypatch.setattr(child, "own_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["child", role, f"{role}-0"])
    with pytest.raises(SystemExit) as ended:
        child.main()
    assert ended.value.code == 1
    return pipes.told


@pytest.mark.parametrize("role", ["bootstrap", "router", "encode", "language"])
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConfigError(["a is wrong", "b too"]), "a is wrong; b too"),
        (TransportError("the port is taken"), "the port is taken"),
        (KeyError("rope"), "KeyError: 'rope' (--log-level debug shows the traceback)"),
        (
            ImportError("libtorch.so:\n  no such file"),
            "ImportError: libtorch.so: no such file (--log-level debug shows",
        ),
        (RuntimeError(), "RuntimeError: no reason given (--log-level debug shows the traceback)"),
    ],
)
def test_a_reason_is_one_sentence(role: str, error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = failed(error, role, monkeypatch)
    assert told.startswith(sentence)
    assert "\n" not in told


def test_debug_has_the_traceback(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", child.__name__)
    assert failed(KeyError("rope"), "encode", monkeypatch, level="debug") == [
        "KeyError: 'rope' (the traceback is above)"
    ]
    assert caplog.records[-1].exc_info


def test_a_process_that_has_answered_already_ends_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="rope"):
        failed(KeyError("rope"), "encode", monkeypatch, reported=True)
