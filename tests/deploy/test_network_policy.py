"""The NetworkPolicies, evaluated as Kubernetes does: who reaches which port of which pod."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.deploy.chart import ALL, NAMESPACE, Chart, Manifest, Workload, rendered

pytestmark = pytest.mark.deploy
FREE_PORT = 43210
"""A port that a process has chosen, for transfers."""


@dataclass(frozen=True)
class Peer:
    """A pod that connects: its namespace and its labels."""

    namespace: str = NAMESPACE
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def namespace_labels(self) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace}


def reaches(chart: Chart, peer: Peer, to: Workload, port: int) -> bool:
    """Returns whether a pod may connect to a port of another one.

    Without a policy that selects it, a pod is open to all; with some, each of their rules adds peers.
    """
    policies = [one["spec"] for one in chart.of("NetworkPolicy") if to in chart.selected(one["spec"]["podSelector"])]
    assert all(one["policyTypes"] == ["Ingress"] for one in policies)
    if not policies:
        return True
    rules = [rule for policy in policies for rule in policy["ingress"]]
    return any(_has_port(rule, to, port) and _has_peer(rule, peer) for rule in rules)


def _has_port(rule: Manifest, to: Workload, port: int) -> bool:
    return "ports" not in rule or any(to.ports.get(one["port"], one["port"]) == port for one in rule["ports"])


def _has_peer(rule: Manifest, peer: Peer) -> bool:
    return "from" not in rule or any(_matches(one, peer) for one in rule["from"])


def _matches(allowed: Manifest, peer: Peer) -> bool:
    assert allowed.keys() <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in allowed:
        if not _selects(allowed["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != NAMESPACE:
        return False
    return _selects(allowed.get("podSelector", {}), peer.labels)


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def pods(chart: Chart) -> dict[str, Peer]:
    return {part: Peer(labels=workload.labels) for part, workload in chart.workloads.items()}


OTHER_RELEASE = {"app.kubernetes.io/name": "embferry", "app.kubernetes.io/instance": "other"}
STRANGERS = {
    "of this namespace": Peer(),
    "of another one": Peer("web"),
    "a router of another release": Peer(labels={**OTHER_RELEASE, "app.kubernetes.io/component": "router"}),
    "a router of another namespace": Peer(
        "web",
        {
            "app.kubernetes.io/name": "embferry",
            "app.kubernetes.io/instance": "shop",
            "app.kubernetes.io/component": "router",
        },
    ),
}


@pytest.mark.parametrize("name", ["default", "vllm", "all", "vllm-all"])
def test_every_pod_has_a_policy(name: str) -> None:
    chart = rendered(name)
    selected = [one.part for each in chart.of("NetworkPolicy") for one in chart.selected(each["spec"]["podSelector"])]
    assert sorted(selected) == sorted(chart.workloads)


@pytest.mark.parametrize("name", ["default", "vllm", "all", "vllm-all"])
def test_only_the_router_asks_workers_and_workers_reach_each_other_for_transfers(name: str) -> None:
    chart = rendered(name)
    own = pods(chart)
    for part, other in (("encode", "language"), ("language", "encode")):
        to = chart.workloads[part]
        http = to.ports["http"]
        assert reaches(chart, own["router"], to, http)
        assert not reaches(chart, own["router"], to, FREE_PORT)
        assert reaches(chart, own[other], to, FREE_PORT)
        for third in {*own} - {"router", other}:
            assert not reaches(chart, own[third], to, http)
            assert not reaches(chart, own[third], to, FREE_PORT)
        for stranger in STRANGERS.values():
            assert not reaches(chart, stranger, to, http)
            assert not reaches(chart, stranger, to, FREE_PORT)


@pytest.mark.parametrize("name", ["default", "all"])
def test_the_bootstrap_server_is_for_the_parts_alone(name: str) -> None:
    chart = rendered(name)
    to = chart.workloads["bootstrap"]
    for part, peer in pods(chart).items():
        assert reaches(chart, peer, to, to.ports["http"]) == (part != "bootstrap")
        assert not reaches(chart, peer, to, FREE_PORT)
    for stranger in STRANGERS.values():
        assert not reaches(chart, stranger, to, to.ports["http"])


@pytest.mark.parametrize("name", ["default", "vllm"])
def test_the_router_alone_is_for_everyone(name: str) -> None:
    chart = rendered(name)
    to = chart.workloads["router"]
    for stranger in STRANGERS.values():
        assert reaches(chart, stranger, to, to.ports["http"])
        assert not reaches(chart, stranger, to, FREE_PORT)


@pytest.mark.parametrize("name", ["all", "vllm-all"])
def test_with_a_list_of_clients_the_router_is_for_them_and_for_instances_that_report_to_it(name: str) -> None:
    chart = rendered(name)
    to = chart.workloads["router"]
    http = to.ports["http"]
    assert reaches(chart, Peer("web"), to, http)
    assert reaches(chart, pods(chart)["language"], to, http)
    assert not reaches(chart, Peer(), to, http)
    assert not reaches(chart, Peer("elsewhere"), to, http)


@pytest.mark.parametrize("name", ["all", "vllm-all"])
def test_prometheus_reaches_what_it_scrapes_and_nothing_else(name: str) -> None:
    chart = rendered(name)
    assert ALL["networkPolicy"]["prometheus"]
    for to in chart.workloads.values():
        for port in to.ports.values():
            assert reaches(chart, Peer("monitoring"), to, port)
        assert not reaches(chart, Peer("monitoring"), to, FREE_PORT)


def test_without_policies_everything_is_open() -> None:
    chart = rendered("off")
    assert not chart.of("NetworkPolicy")
    assert reaches(chart, Peer("elsewhere"), chart.workloads["encode"], FREE_PORT)


def test_a_policy_too_many_is_noticed() -> None:
    """The evaluation itself: a rule without peers, or a selector that is too wide, opens a worker."""
    chart = rendered("default")
    to = chart.workloads["encode"]
    own = next(one for one in chart.of("NetworkPolicy") if to in chart.selected(one["spec"]["podSelector"]))
    for rule in ({"ports": [{"port": "http"}]}, {"from": [{"podSelector": {}}]}):
        wide = {**own, "spec": {**own["spec"], "ingress": [rule]}}
        opened = Chart([*chart.manifests, wide], is_vllm=False)
        assert reaches(opened, Peer(), to, to.ports["http"])
