"""The settings, variables and arguments of the chart are those that the processes read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from embferry.cli.main import app
from embferry.connectors.vllm import config as connector
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError, load
from embferry.serve.supervisor import vllm as supervisor
from embferry.trust.keys import Key
from tests.deploy.chart import (
    NAME,
    NAMESPACE,
    VALUE_SETS,
    Workload,
    rendered,
    text_of,
)

pytestmark = pytest.mark.deploy
every_set = pytest.mark.parametrize("name", VALUE_SETS)


def variables(workload: Workload) -> dict[str, str]:
    """Returns the environment of a container; values from elsewhere are made up."""
    found: dict[str, str] = {}
    for entry in workload.container["env"]:
        assert entry["name"] not in found, f"{entry['name']} stands twice"
        value = entry.get("value", "10.0.0.7")
        found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


def settings_of(workload: Workload, text: str, tmp_path: Path) -> Settings:
    """Returns the settings that a process of ours reads; fails if one of them has an unknown name or a bad value."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    environ = variables(workload)
    mounted = {mount["name"]: mount["mountPath"] for mount in workload.container["volumeMounts"]}
    assert environ["EMBFERRY_CONFIG"] == f"{mounted['settings']}/settings.yaml"
    return load({}, environ | {"EMBFERRY_CONFIG": str(file)}).settings


@every_set
def test_our_processes_take_their_settings(name: str, tmp_path: Path) -> None:
    chart = rendered(name)
    commands = {command.name for command in app.registered_commands}
    for part, workload in chart.workloads.items():
        if workload.is_vllm:
            continue
        settings = settings_of(workload, chart.settings, tmp_path)
        assert workload.container["args"] == [part]
        assert part in commands
        own = getattr(settings, part)
        assert own.port == workload.ports["http"]
        assert settings.host in ("0.0.0.0", "::")
        assert settings.router.engine == ("vllm" if chart.is_vllm else "embferry")
        if part in ("encode", "language"):
            assert settings.advertise_host is not None


def test_a_setting_of_the_user_replaces_the_charts(tmp_path: Path) -> None:
    chart = rendered("all")
    settings = settings_of(chart.workloads["encode"], chart.settings, tmp_path)
    assert settings.media.allowed_hosts == ("upload.wikimedia.org",)
    assert (settings.media.max_total_bytes, settings.cache.max_bytes) == (268435456, 107374182400)
    assert settings.transfer.transports == ("tcp", "http")
    assert settings.log_level == "debug"
    assert settings.public_model_name == "eyes"
    text = yaml.safe_load_all(text_of({"settings": {"log_format": "plain", "router": {"request_timeout": 9}}}))
    (config,) = [yaml.safe_load(one["data"]["settings.yaml"]) for one in text if one["kind"] == "ConfigMap"]
    assert config["log_format"] == "plain"
    assert config["router"] == {"engine": "embferry", "port": 8000, "request_timeout": 9, "served_model_name": "shapes"}


def test_variables_of_services_would_be_read_as_settings() -> None:
    """Kubernetes sets them for every Service of the namespace, unless a pod says that it wants none."""
    with pytest.raises(ConfigError, match="EMBFERRY_ROUTER_PORT"):
        load({}, {"EMBFERRY_ROUTER_PORT": "tcp://10.96.0.7:8000"})


@every_set
def test_files_that_variables_and_settings_name_are_mounted(name: str, tmp_path: Path) -> None:
    chart = rendered(name)
    for workload in chart.workloads.values():
        environ = variables(workload)
        named = [value for key, value in environ.items() if key.startswith("EMBFERRY_") and value.startswith("/etc/")]
        if workload.part == "router":
            keys = yaml.safe_load(chart.settings)["router"].get("api_keys_file")
            named += [keys] if keys else []
        assert len(named) >= 1
        mounts = {mount["mountPath"]: mount for mount in workload.container["volumeMounts"]}
        assert len(mounts) == len(workload.container["volumeMounts"])
        for mount in mounts.values():
            workload.volume(mount["name"])
        for path in named:
            folder, _, file = path.rpartition("/")
            volume = workload.volume(mounts[folder]["name"])
            if "secret" in volume:
                assert file in [item["path"] for item in volume["secret"]["items"]]
                assert volume["secret"]["defaultMode"] == 0o440
            else:
                (config,) = chart.of("ConfigMap")
                assert volume["configMap"]["name"] == config["metadata"]["name"]
                assert file in config["data"]
        writable = {mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")}
        assert {"/tmp", "/cache"} <= writable
        assert environ["HOME"] in writable
    settings_of(chart.workloads["router"], chart.settings, tmp_path)


@pytest.mark.parametrize("name", ["vllm", "vllm-all"])
@pytest.mark.parametrize("part", ["encode", "language"])
def test_instances_get_the_arguments_that_embferry_serve_gives(
    name: str, part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "vllm_command", lambda: "vllm")
    chart = rendered(name)
    workload = chart.workloads[part]
    settings = settings_of(chart.workloads["router"], chart.settings, tmp_path)
    extra = VALUE_SETS[name].get("vllm", {}).get("extraArgs", [])
    settings = settings.model_copy(update={"vllm": settings.vllm.model_copy(update={"transports": ("tcp",)})})
    place = supervisor.Place("", tmp_path, (workload.ports["http"], workload.ports["metrics"]), "its router")
    expected = supervisor.instance_command(settings, part, place, extra)
    given = ["vllm", *workload.container["args"]]
    ours, theirs = options(given), options(expected)
    assert ours.pop("--host") == "0.0.0.0"
    assert theirs.pop("--host") == supervisor.HOST
    gpus = VALUE_SETS[name][part]["gpus"]
    assert ours.pop("--tensor-parallel-size", "1") == str(gpus)
    own, other = (json.loads(one.pop("--ec-transfer-config")) for one in (ours, theirs))
    assert ours == theirs
    extra_own, extra_other = own.pop("ec_connector_extra_config"), other.pop("ec_connector_extra_config")
    assert own == other
    assert (extra_own.pop("host"), extra_own.pop("advertise")) == ("0.0.0.0", "$(EMBFERRY_ADVERTISE_HOST)")
    assert extra_own.pop("transports") == VALUE_SETS[name].get("transports", ["tcp"])
    assert extra_other.pop("transports") == ["tcp"]
    if "vllm" in VALUE_SETS[name]:
        assert extra_own.pop("num_blocks") == 2048
    if part == "language":
        scheme = "https" if "tls" in VALUE_SETS[name] else "http"
        assert extra_own.pop("router") == f"{scheme}://{NAME}-router.{NAMESPACE}.svc:8000"
        assert extra_other.pop("router") == "its router"
    if "cache" in extra_other:
        extra_other["cache"] = {key: extra_other["cache"][key] for key in extra_own["cache"]}
    assert extra_own == extra_other
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    connector.parse(json.loads(options(given)["--ec-transfer-config"])["ec_connector_extra_config"])
    environ = variables(workload)
    entry = next(one for one in workload.container["env"] if one["name"] == "VLLM_API_KEY")
    assert entry["valueFrom"]["secretKeyRef"]["key"] == "api-key"
    assert environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") == ("http/protobuf" if name == "vllm-all" else None)


def options(words: list[str]) -> dict[str, Any]:
    """Returns the words by option; those before the first option under ""."""
    found: dict[str, Any] = {"": []}
    name = ""
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{word} stands twice"
            name = word
            found[name] = None
        elif name and found[name] is None:
            found[name] = word
        else:
            assert not name, f"{word} belongs to no option"
            found[""].append(word)
    return found


@pytest.mark.parametrize("name", ["vllm", "vllm-all"])
def test_the_router_knows_every_instance_that_there_may_be(name: str, tmp_path: Path) -> None:
    chart = rendered(name)
    settings = settings_of(chart.workloads["router"], chart.settings, tmp_path).vllm
    for part, urls in (("encode", settings.encode_urls), ("language", settings.language_urls)):
        workload = chart.workloads[part]
        (service,) = [
            one for one in chart.of("Service") if one["metadata"]["name"] == workload.manifest["spec"]["serviceName"]
        ]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"]
        scaled = [one for one in chart.of("ScaledObject") if one["spec"]["scaleTargetRef"]["name"] == workload.name]
        most = scaled[0]["spec"]["maxReplicaCount"] if scaled else workload.manifest["spec"]["replicas"]
        host = f"{service['metadata']['name']}.{NAMESPACE}.svc"
        port = workload.ports["http"]
        assert list(urls) == [f"http://{workload.name}-{number}.{host}:{port}" for number in range(most)]


@pytest.mark.parametrize("name", ["default", "all"])
def test_workers_and_routers_find_the_bootstrap_server(name: str, tmp_path: Path) -> None:
    chart = rendered(name)
    bootstrap = chart.workloads["bootstrap"]
    assert bootstrap.manifest["spec"]["replicas"] == 1
    assert bootstrap.manifest["spec"]["strategy"] == {"type": "Recreate"}, "two of them would share the workers"
    scheme = "https" if name == "all" else "http"
    for part in ("router", "encode", "language"):
        settings = settings_of(chart.workloads[part], chart.settings, tmp_path)
        assert settings.bootstrap_url == f"{scheme}://{NAME}-bootstrap.{NAMESPACE}.svc:{bootstrap.ports['http']}"
