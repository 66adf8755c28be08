"""Where instances of vLLM that ``embferry serve`` starts send their spans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embferry.connectors.vllm.config import parse
from embferry.serve.config import Settings, TracesSettings
from embferry.serve.supervisor import vllm
from embferry.serve.supervisor.process import ProcessRole
from embferry.serve.supervisor.vllm import TRACES, Place

COLLECTOR = "http://collector:4318"
PLACE = Place("language-0", Path("folder"), (1, 2, 3), "http://127.0.0.1:8000")
SETTINGS = Settings(traces=TracesSettings(endpoint=COLLECTOR))
PROTOCOL, SERVICE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_SERVICE_NAME"


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "vllm_command", lambda: "vllm")
    monkeypatch.delenv(SERVICE, raising=False)


@pytest.mark.parametrize("role", ["encode", "language", "prefill", "decode"])
def test_vllm_and_the_connector_send_them_where_the_router_does(role: ProcessRole) -> None:
    words = vllm.instance_command(SETTINGS, role, PLACE, ())
    assert words[words.index(f"--{TRACES}") + 1] == f"{COLLECTOR}/v1/traces"
    transfer = json.loads(words[words.index("--ec-transfer-config") + 1])
    config = parse(transfer["ec_connector_extra_config"])
    assert config.traces_endpoint == (None if role == "encode" else COLLECTOR)
    environ = vllm._environ(SETTINGS, f"{role}-0", 3, ())
    assert (environ[PROTOCOL], environ[SERVICE]) == ("http/protobuf", f"vllm-{role}-0")


def test_without_a_collector_nothing_of_it_is_said() -> None:
    words = vllm.instance_command(Settings(), "language", PLACE, ())
    assert f"--{TRACES}" not in words
    assert "traces_endpoint" not in " ".join(words)
    assert not {PROTOCOL, SERVICE} & vllm._environ(Settings(), "language-0", 3, ()).keys()


def test_the_user_s_own_option_counts() -> None:
    extra = (f"--{TRACES}", "grpc://mine:4317")
    words = vllm.instance_command(SETTINGS, "language", PLACE, extra)
    assert words.count(f"--{TRACES}") == 1
    assert words[words.index(f"--{TRACES}") + 1] == "grpc://mine:4317"
    assert not {PROTOCOL, SERVICE} & vllm._environ(SETTINGS, "language-0", 3, extra).keys()
