"""Renders the chart with Helm, and reads what it gives as Kubernetes does."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/embferry"
PAGE = (ROOT / "docs/kubernetes.md").read_text("utf-8")
RELEASE, NAMESPACE = "shop", "ai"
NAME = f"{RELEASE}-embferry"
Manifest = dict[str, Any]

GPU_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
ALL: dict[str, Any] = {
    "imagePullSecrets": [{"name": "registry"}],
    "model": {"servedName": "eyes", "claim": "model", "cacheClaim": "hub", "hubSecret": "hub-token"},
    "keys": {"secretName": "our-keys", "apiKeysFile": True},
    "tls": {"secretName": "our-certificate"},
    "transports": ["tcp", "http"],
    "settings": {
        "media": {"allowed_hosts": ["upload.wikimedia.org"], "max_total_bytes": 268435456},
        "traces": {"endpoint": "http://collector.tracing:4318"},
        "cache": {"url": "file:///shared/embeddings", "max_bytes": 107374182400},
    },
    "scaling": {"enabled": True, "prometheusUrl": "http://prometheus-operated.monitoring:9090"},
    "metrics": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "web"}}}],
        "prometheus": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    },
    "serviceAccountName": "embferry",
    "podLabels": {"team": "vision"},
    "encode": {
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "embeddings"}}],
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
        "env": [{"name": "EMBFERRY_LOG_LEVEL", "value": "debug"}],
        "nodeSelector": {"pool": "big"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {}},
        "priorityClassName": "high",
        "podAnnotations": {"note": "an annotation"},
    },
    "router": {"service": {"type": "LoadBalancer", "annotations": {"cloud/internal": "true"}}},
}
VLLM: dict[str, Any] = {
    "engine": "vllm",
    "model": {"name": GPU_MODEL},
    "encode": {"gpus": 1, "replicas": 2},
    "language": {"gpus": 2},
}
VALUE_SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "vllm": VLLM,
    "all": {**ALL, "router": {**ALL["router"], "replicas": 3}},
    "vllm-all": {
        **ALL,
        **VLLM,
        "model": ALL["model"] | VLLM["model"],
        "encode": ALL["encode"] | VLLM["encode"],
        "vllm": {"extraArgs": ["--gpu-memory-utilization", "0.9"], "connector": {"num_blocks": 2048}},
    },
    "off": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "metrics": {"annotations": False},
        "host": "::",
    },
}


class RefusedError(Exception):
    """Helm's reason not to render the chart."""


def helm() -> str:
    """Returns the path of Helm: beside the running Python, where scripts/setup_env.py puts it, or on PATH."""
    beside = Path(sys.executable).with_name("helm")
    found = str(beside) if beside.exists() else shutil.which("helm")
    assert found is not None, "there is no helm; make test-deploy installs it"
    return found


def text_of(values: Mapping[str, Any], *, notes: bool = False, release: str = RELEASE) -> str:
    """Returns what Helm makes of the chart with these values. Raises RefusedError if it refuses them."""
    verb = ["install", "--dry-run=client"] if notes else ["template"]
    command = [helm(), *verb, release, str(CHART), "--namespace", NAMESPACE, "--values", "-"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RefusedError(done.stderr)
    return done.stdout


def console_blocks() -> list[str]:
    """Returns the commands of the documentation, a block at a time."""
    return re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def hosts_of_certificate() -> list[str]:
    """Returns the names in the command of the documentation that makes the certificate, for this release."""
    (block,) = [one for one in console_blocks() if "keys cert" in one]
    found = re.findall(r"--host '?([^'\s]+)'?", block)
    return [name.replace("vision-embferry", NAME).replace(".ai.svc", f".{NAMESPACE}.svc") for name in found]


def asking(values: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command in Helm's notes that asks a question."""
    notes = text_of(values, notes=True).partition("NOTES:")[2].splitlines()
    (line,) = [line for line in notes if line.strip().startswith("embferry ask")]
    return shlex.split(line)


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet."""

    manifest: Manifest

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def part(self) -> str:
        return str(self.labels["app.kubernetes.io/component"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.manifest["spec"]["template"]["metadata"]["labels"])

    @property
    def annotations(self) -> dict[str, str]:
        return dict(self.manifest["spec"]["template"]["metadata"].get("annotations", {}))

    @property
    def pod(self) -> Manifest:
        """The spec of its pods."""
        return dict(self.manifest["spec"]["template"]["spec"])

    @property
    def container(self) -> Manifest:
        (found,) = self.pod["containers"]
        return dict(found)

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def is_vllm(self) -> bool:
        return self.container.get("command") == ["vllm"]

    def volume(self, name: str) -> Manifest:
        (found,) = [volume for volume in self.pod["volumes"] if volume["name"] == name]
        return dict(found)

    def probes(self) -> Iterator[tuple[str, Manifest]]:
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            yield kind, self.container[kind]


@dataclass(frozen=True)
class Chart:
    """The manifests that one set of values gives."""

    manifests: list[Manifest]
    is_vllm: bool

    def of(self, kind: str) -> list[Manifest]:
        return [one for one in self.manifests if one["kind"] == kind]

    @property
    def workloads(self) -> dict[str, Workload]:
        """The workloads by their part."""
        found = [Workload(one) for kind in ("Deployment", "StatefulSet") for one in self.of(kind)]
        return {one.part: one for one in found}

    @property
    def settings(self) -> str:
        """The text of the settings file."""
        (found,) = self.of("ConfigMap")
        return str(found["data"]["settings.yaml"])

    def selected(self, selector: Manifest) -> list[Workload]:
        """Returns the workloads whose pods a selector of this namespace chooses."""
        wanted = selector.get("matchLabels", selector) if selector else {}
        return [one for one in self.workloads.values() if wanted.items() <= one.labels.items()]


def chart_of(values: Mapping[str, Any]) -> Chart:
    """Returns the chart rendered with these values."""
    return Chart([one for one in yaml.safe_load_all(text_of(values)) if one], values.get("engine") == "vllm")


@cache
def rendered(name: str) -> Chart:
    """Returns the chart rendered with one of the sets of values."""
    return chart_of(VALUE_SETS[name])
