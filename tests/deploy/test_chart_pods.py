"""The pods of the chart: rights, probes, time; and that selectors, ports and metrics are there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

import document_metrics
from embferry.cache.encoder_store import CLOSE_S as CACHE_SECONDS
from embferry.cli.main import app
from embferry.serve.config import Settings
from embferry.serve.http.serving import CLOSE_SECONDS, SPARE_SECONDS
from embferry.serve.router.process import DRAIN_SECONDS as ROUTER_SECONDS
from embferry.serve.worker.process import DRAIN_SECONDS
from embferry.serve.worker.service import JOIN_SECONDS
from metric_names import TARGET_LABELS
from tests.deploy.chart import (
    NAME,
    NAMESPACE,
    RELEASE,
    VALUE_SETS,
    Manifest,
    Workload,
    chart_of,
    hosts_of_certificate,
    rendered,
    text_of,
)
from tests.tooling.promql import Checker, Metric, series_of

pytestmark = pytest.mark.deploy
every_set = pytest.mark.parametrize("name", VALUE_SETS)
COMPONENT = "__meta_kubernetes_pod_label_app_kubernetes_io_component"
OPEN_PATHS = {"/health", "/ready", "/metrics"}


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


@pytest.mark.parametrize("name", ["default", "vllm"])
def test_the_runtime_class_of_a_part_is_that_of_its_pods(name: str) -> None:
    assert not any("runtimeClassName" in one.pod for one in rendered(name).workloads.values())
    for part in rendered(name).workloads:
        values = {**VALUE_SETS[name], part: {**VALUE_SETS[name].get(part, {}), "runtimeClassName": "nvidia"}}
        found = {key: one.pod.get("runtimeClassName") for key, one in chart_of(values).workloads.items()}
        assert found == {key: "nvidia" if key == part else None for key in found}


@pytest.mark.parametrize("name", ["default", "vllm"])
def test_settings_that_change_start_new_pods_of_those_that_read_them(name: str) -> None:
    def templates(values: dict[str, Any]) -> dict[str, Any]:
        found = [one for one in yaml.safe_load_all(text_of(values)) if one]
        return {one["metadata"]["name"]: one["spec"]["template"] for one in found if "template" in one.get("spec", {})}

    before = templates(VALUE_SETS[name])
    after = templates({**VALUE_SETS[name], "settings": {"router": {"request_timeout": 9}}})
    changed = {part for part in before if before[part] != after[part]}
    assert changed == ({f"{NAME}-router"} if name == "vllm" else before.keys())


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


MONITORED: dict[str, Any] = {"metrics": {"podMonitor": {"enabled": True}}}
TLS: dict[str, Any] = {"tls": {"secretName": "our-certificate"}}


@pytest.mark.parametrize("name", ["default", "vllm"])
@pytest.mark.parametrize("tls", [{}, TLS], ids=["plain", "tls"])
def test_prometheus_scrapes_each_port_once_and_as_it_speaks(name: str, tls: dict[str, Any]) -> None:
    chart = chart_of({**VALUE_SETS[name], **MONITORED, **tls})
    (monitor,) = chart.of("PodMonitor")
    for part, workload in chart.workloads.items():
        endpoints = [one for one in monitor["spec"]["podMetricsEndpoints"] if scrapes(one, workload)]
        assert sorted(one["port"] for one in endpoints) == sorted(workload.ports)
        for endpoint in endpoints:
            is_tls = bool(tls) and not workload.is_vllm  # no server of vLLM has it, nor the connector's metrics
            assert endpoint.get("scheme", "http") == ("https" if is_tls else "http"), part
            if is_tls:
                trusted = endpoint["tlsConfig"]
                assert trusted["serverName"] in hosts_of_certificate()
                files = [trusted["ca"]["secret"], trusted["cert"]["secret"], trusted["keySecret"]]
                keys = [one["key"] for one in files]
                assert {one["name"] for one in files} == {"our-certificate"}
                assert keys == [one["key"] for one in workload.volume("tls")["secret"]["items"]]
            else:
                assert "tlsConfig" not in endpoint


def scrapes(endpoint: Manifest, workload: Workload) -> bool:
    """Returns whether Prometheus scrapes pods at an endpoint: they have its port, and no rule drops them."""
    kept = [rule for rule in endpoint["relabelings"] if rule.get("action", "replace") != "replace"]
    assert all(rule["action"] == "keep" and rule["sourceLabels"] == [COMPONENT] for rule in kept)
    return endpoint["port"] in workload.ports and all(re.fullmatch(rule["regex"], workload.part) for rule in kept)


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


def pods_of(workload: Workload) -> list[str]:
    """Returns names of pods, as Kubernetes makes them."""
    ends = ["0", "17"] if workload.manifest["kind"] == "StatefulSet" else ["7d4b9c6f5-x2x8z"]
    return [f"{workload.name}-{end}" for end in ends]


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
        (pods,) = re.findall(r'pod=~"([^"]+)"', query)
        (workload,) = [one for one in chart.workloads.values() if any(re.fullmatch(pods, pod) for pod in pods_of(one))]
        longer = [pod.replace(NAME, f"{NAME}-{workload.part}") for pod in pods_of(workload)]
        assert not any(re.fullmatch(pods, pod) for pod in longer), "of a release with a longer name"
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
