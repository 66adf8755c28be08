"""The chart, rendered by Helm: valid for Kubernetes, and true to what the processes read and serve."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import document_metrics
from embferry import __version__
from embferry.cache.encoder_store import CLOSE_S as CACHE_SECONDS
from embferry.cli.main import app
from embferry.connectors.vllm import config as connector
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError, load
from embferry.serve.http.serving import CLOSE_SECONDS, SPARE_SECONDS
from embferry.serve.router.process import DRAIN_SECONDS as ROUTER_SECONDS
from embferry.serve.supervisor import vllm as supervisor
from embferry.serve.worker.process import DRAIN_SECONDS
from embferry.serve.worker.service import JOIN_SECONDS
from embferry.trust.keys import Key
from metric_names import TARGET_LABELS
from tests.deploy.chart import (
    CHART,
    GPU_MODEL,
    NAME,
    NAMESPACE,
    RELEASE,
    VALUE_SETS,
    RefusedError,
    Workload,
    helm,
    rendered,
    text_of,
)
from tests.tooling.promql import Checker, Metric, series_of

pytestmark = pytest.mark.deploy
every_set = pytest.mark.parametrize("name", VALUE_SETS)
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
OLDEST, NEWEST = "1.27", "1.37"
OPEN_PATHS = {"/health", "/ready", "/metrics"}


@every_set
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_takes_every_manifest(name: str, version: str) -> None:
    import kubernetes_validate

    own = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
    for manifest in rendered(name).manifests:
        if manifest["apiVersion"] not in own:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", ["all", "vllm-all"])
def test_keda_and_the_operator_of_prometheus_take_theirs(name: str) -> None:
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    chart = rendered(name)
    found = [(ScaledObject, one) for one in chart.of("ScaledObject")]
    found += [(PodMonitor, one) for one in chart.of("PodMonitor")]
    assert len(found) == 3
    for model, manifest in found:
        read = model.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
        assert read == manifest, "a key that the model does not know is left out"


@every_set
def test_no_key_stands_twice(name: str) -> None:
    from yamllint import linter
    from yamllint.config import YamlLintConfig

    rules = YamlLintConfig("{rules: {key-duplicates: enable, anchors: enable, trailing-spaces: enable}}")
    text = text_of(VALUE_SETS[name])
    assert [f"{one.line}: {one.desc}" for one in linter.run(text, rules) if one.rule != "trailing-spaces"] == []


def test_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    for workload in rendered("vllm").workloads.values():
        assert workload.container["image"].endswith(f":{__version__}")


# --- values ----------------------------------------------------------------------------------------------------------


def maps(values: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the place of every map of values that names its keys."""
    yield place
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from maps(value, (*place, key))


FREE = {"requests", "limits"}
"""Maps whose keys Kubernetes defines."""


@pytest.mark.parametrize(
    "place", [p for p in maps(DEFAULTS) if not FREE & {*p}], ids=lambda place: ".".join(place) or "top"
)
def test_a_misspelt_value_is_refused(place: tuple[str, ...]) -> None:
    import jsonschema

    jsonschema.validate(DEFAULTS, SCHEMA)
    values = copy.deepcopy(DEFAULTS)
    inner = values
    for key in place:
        inner = inner[key]
    inner["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"encode": {"replica": 2}}, "/encode"),
        ({"engine": "sglang"}, "/engine"),
        ({"engine": "vllm"}, "/model/name"),
        ({"engine": "vllm", "model": {"name": GPU_MODEL}, "router": {"replicas": 2}}, "/router/replicas"),
        ({"encode": {"gpus": 1}}, "/encode/gpus"),
        ({"router": {"port": 80}}, "/router/port"),
        ({"scaling": {"enabled": True}}, "scaling.prometheusUrl"),
        ({"encode": {"scaling": {"min": 0}}}, "/encode/scaling/min"),
        ({"host": "127.0.0.1"}, "/host"),
    ],
)
def test_helm_refuses_values_that_cannot_work(values: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(why)):
        text_of(values)


OTHERS: dict[str, Any] = {
    "engine": None,  # its own sets of values
    "host": "::",
    "interval": "30s",
    "pullPolicy": "Always",
    "type": "NodePort",
    "mountPath": "/elsewhere",
    "prometheusUrl": "http://elsewhere:9090",
    "transports": ["http"],
    "affinity": {"nodeAffinity": {}},
    "settings": {"log_level": "warning"},
    "connector": {"num_blocks": 7},
    "cacheSize": "7Gi",
    "sharedMemory": "7Gi",
    "cpu": "7",
    "memory": "7Gi",
}
"""Another value for those that do not take any text."""


def other(key: str, value: Any) -> Any:
    """Returns a value that is not the one of the sets that are rendered."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return "another"
    listed = {"env": [{"name": "OTHER", "value": "1"}], "imagePullSecrets": [{"name": "another"}]}
    listed |= {"volumes": [{"name": "another", "emptyDir": {}}], "tolerations": [{"key": "another"}]}
    listed |= {"volumeMounts": [{"name": "another", "mountPath": "/another"}]}
    listed |= {key: [{"podSelector": {"matchLabels": {"an": "other"}}}] for key in ("clients", "prometheus")}
    return listed.get(key, ["--another"]) if isinstance(value, list) else {"another": "one"}


def leaves(values: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*place, key))
        else:
            yield (*place, key)


def test_every_value_has_an_effect() -> None:
    """A value that no template reads would be a promise that is not kept."""
    base = {name: text_of(VALUE_SETS[name]) for name in ("all", "vllm-all")}
    without = []
    for place in leaves(DEFAULTS):
        inner: Any = DEFAULTS
        for key in place:
            inner = inner[key]
        changed = other(place[-1], inner)
        if changed is None or (place[:2] == ("encode", "gpus") or place[:2] == ("language", "gpus")):
            continue
        name = "vllm-all" if place[0] == "vllm" else "all"
        if place[-1] == "replicas" and place[0] != "router":
            continue  # KEDA has them here; test_the_router_knows_every_instance_that_there_may_be
        values = copy.deepcopy(VALUE_SETS[name])
        into = values
        for key in place[:-1]:
            into = into.setdefault(key, {})
        into[place[-1]] = changed
        if text_of(values) == base[name]:
            without.append(".".join(place))
    assert without == []


def documented() -> list[str]:
    """Returns the commands of the documentation that call Helm."""
    page = (CHART.parents[2] / "docs/kubernetes.md").read_text("utf-8")
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith("helm upgrade")]


def test_the_documentation_calls_helm_with_values_that_it_takes() -> None:
    commands = documented()
    assert len(commands) == 5
    known: list[str] = []
    for command in commands:
        words = shlex.split(command)[2:]
        flags = [word for word in words if word not in ("--install", "--reuse-values")]
        assert flags[:2] == ["vision", "deploy/helm/embferry"]
        done = subprocess.run(
            [helm(), "template", flags[0], str(CHART), *(known if "--reuse-values" in words else []), *flags[2:]],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        known += [] if "--reuse-values" in words else flags[4:]
        assert all(
            one["metadata"]["name"].startswith("vision-embferry") for one in yaml.safe_load_all(done.stdout) if one
        )


def test_the_notes_name_the_secret_and_the_service() -> None:
    notes = text_of({"keys": {"secretName": "our-keys"}}, notes=True).partition("NOTES:")[2]
    for words in ("shapes is served at", f"service/{NAME}-router", "create secret generic our-keys", "cluster-key="):
        assert words in notes


# --- settings, arguments and variables -------------------------------------------------------------------------------


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
    port, metrics_port = workload.ports["http"], workload.ports["metrics"]
    expected = supervisor.instance_command(settings, part, port, metrics_port, extra)
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
        assert extra_other.pop("router") == f"http://{supervisor.HOST}:8000"
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


# --- pods ------------------------------------------------------------------------------------------------------------


@every_set
def test_pods_have_the_rights_that_they_need_and_no_more(name: str) -> None:
    for workload in rendered(name).workloads.values():
        pod, container = workload.pod, workload.container
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])


@every_set
def test_probes_ask_endpoints_that_answer_without_a_proof(name: str) -> None:
    chart = rendered(name)
    tls = "tls" in VALUE_SETS[name]
    for part, workload in chart.workloads.items():
        for kind, probe in workload.probes():
            if "exec" in probe:
                assert tls
                assert part != "router"
                verb, url = probe["exec"]["command"][1:]
                assert probe["exec"]["command"][0] == "embferry"
                assert verb in {command.name for command in app.registered_commands}
                port, _, path = url.partition(":")[2].partition("/")
                assert int(port) == workload.ports["http"]
                path = f"/{path}"
            else:
                path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
                assert port in workload.ports
                assert probe["httpGet"]["scheme"] == ("HTTPS" if tls and not workload.is_vllm else "HTTP")
                assert part == "router" or workload.is_vllm or not tls, "it would have to show a certificate"
            is_worker = part in ("encode", "language") and not workload.is_vllm
            assert path == ("/ready" if kind == "readinessProbe" and is_worker else "/health")
            assert path in OPEN_PATHS


@every_set
def test_a_start_has_the_time_that_it_may_need(name: str) -> None:
    settings = Settings()
    for part, workload in rendered(name).workloads.items():
        probe = workload.container["startupProbe"]
        seconds = probe["periodSeconds"] * probe["failureThreshold"]
        needed = settings.vllm.instance_timeout if workload.is_vllm else settings.serve.start_timeout
        assert seconds >= (needed if part in ("encode", "language") else 60)


@every_set
def test_an_end_has_the_time_that_it_needs(name: str) -> None:
    most = {
        "router": ROUTER_SECONDS + SPARE_SECONDS,
        "bootstrap": 5,
        "encode": DRAIN_SECONDS + JOIN_SECONDS + CACHE_SECONDS + CLOSE_SECONDS + SPARE_SECONDS,
        "language": DRAIN_SECONDS + JOIN_SECONDS + CLOSE_SECONDS + SPARE_SECONDS,
    }
    for part, workload in rendered(name).workloads.items():
        grace = workload.pod["terminationGracePeriodSeconds"]
        before = 0
        if part == "router":
            command = workload.container["lifecycle"]["preStop"]["exec"]["command"]
            assert command[0] == "sleep"
            before = int(command[1])
            assert before >= 5
        assert grace - before > most[part]


def test_gpus_are_limits_and_vllm_has_shared_memory() -> None:
    chart = rendered("vllm")
    for part, count in (("encode", 1), ("language", 2)):
        workload = chart.workloads[part]
        assert workload.container["resources"]["limits"]["nvidia.com/gpu"] == count
        (mount,) = [one for one in workload.container["volumeMounts"] if one["mountPath"] == "/dev/shm"]
        assert workload.volume(mount["name"])["emptyDir"]["medium"] == "Memory"
    assert "nvidia.com/gpu" not in rendered("default").workloads["encode"].container["resources"]["limits"]


def test_settings_that_change_start_new_pods() -> None:
    one, other = (
        {
            w["metadata"]["name"]: w["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]
            for w in found
            if w
        }
        for found in (
            [d for d in yaml.safe_load_all(text_of(values)) if d and d["kind"] in ("Deployment", "StatefulSet")]
            for values in ({}, {"settings": {"log_level": "debug"}})
        )
    )
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


# --- what refers to what ---------------------------------------------------------------------------------------------


@every_set
def test_selectors_find_their_pods(name: str) -> None:
    chart = rendered(name)
    for workload in chart.workloads.values():
        assert [one.name for one in chart.selected(workload.manifest["spec"]["selector"])] == [workload.name]
        (spread,) = workload.pod["topologySpreadConstraints"]
        assert [one.name for one in chart.selected(spread["labelSelector"])] == [workload.name]
    services = chart.of("Service")
    assert len(services) == len(chart.workloads)
    for service in services:
        (workload,) = chart.selected(service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert workload.ports[port["targetPort"]] == port["port"]
    budgets = chart.of("PodDisruptionBudget")
    assert {chart.selected(one["spec"]["selector"])[0].part for one in budgets} == (
        {"router", "encode", "language"} if name != "off" else set()
    )
    for scaled in chart.of("ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]
        (workload,) = [one for one in chart.workloads.values() if one.name == target["name"]]
        assert target["kind"] == workload.manifest["kind"]
        assert "replicas" not in workload.manifest["spec"], "an upgrade would undo what KEDA has done"
    for monitor in chart.of("PodMonitor"):
        assert len(chart.selected(monitor["spec"]["selector"])) == len(chart.workloads)
        known = {port for workload in chart.workloads.values() for port in workload.ports}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == known


def test_two_releases_in_one_namespace_do_not_meet() -> None:
    chart = rendered("default")
    for workload in chart.workloads.values():
        assert workload.labels["app.kubernetes.io/instance"] == RELEASE
        assert workload.name.startswith(NAME)


@every_set
def test_annotations_for_prometheus_name_a_port_with_metrics(name: str) -> None:
    for workload in rendered(name).workloads.values():
        told = {key.partition("/")[2]: value for key, value in workload.annotations.items() if "prometheus" in key}
        if name == "off":
            assert told == {}
            continue
        assert told["port"] == str(workload.ports["http"])
        assert told["path"] in OPEN_PATHS
        probe = workload.container["livenessProbe"]
        if "httpGet" in probe:
            assert told["scheme"].upper() == probe["httpGet"]["scheme"]


@pytest.mark.parametrize("name", ["all", "vllm-all"])
def test_keda_reads_metrics_that_there_are(name: str) -> None:
    target = frozenset({*TARGET_LABELS, "namespace", "pod"})
    served: dict[str, dict[str, Metric]] = {}
    for title, rows in document_metrics.parts().items():
        served[title] = {row.name: Metric(row.type, target | set(row.labels)) for row in rows}
    chart = rendered(name)
    for scaled in chart.of("ScaledObject"):
        (trigger,) = scaled["spec"]["triggers"]
        query = trigger["metadata"]["query"]
        pods = re.search(r'pod=~"([^"]+)-\.\*"', query)
        assert pods is not None
        (workload,) = [one for one in chart.workloads.values() if one.name == pods[1]]
        title = {"router": "vLLM" if chart.is_vllm else "this project", "encode": "Encode", "language": "Language"}
        (metrics,) = [
            found
            for key, found in served.items()
            if title[workload.part] in key and not ("Router" in key) ^ (workload.part == "router")
        ]
        checked = Checker(query, series_of(metrics))
        assert checked.faults == []
        assert checked.labels == set(), "KEDA takes one number"
        assert f'namespace="{NAMESPACE}"' in query
        assert float(trigger["metadata"]["threshold"]) >= 1
