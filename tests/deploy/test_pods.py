"""The pods of the chart, started as Kubernetes would start them, one process each, and asked a question.

Their environment, files, users and rights are those of the manifests; secrets have the owner and the mode with which
Kubernetes mounts them; names of Services and pods lead to their addresses. Network policies are not in force.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from embferry.trust.certificates import make_ca, make_certificate
from embferry.trust.keys import Key
from tests.deploy.chart import (
    NAME,
    NAMESPACE,
    PAGE,
    Chart,
    Manifest,
    Workload,
    asking,
    hosts_of_certificate,
    text_of,
)
from tests.deploy.containers import ROOT, Image, Network, Running
from tests.deploy.waiting import until

pytestmark = pytest.mark.deploy
API_KEY = "a-key-of-this-test"
TLS = {"tls": {"secretName": "embferry-tls"}}
_ASK = """
import ssl, sys, urllib.request
context = ssl._create_unverified_context()
sys.exit(urllib.request.urlopen(sys.argv[1], timeout=5, context=context).status != 200)
"""
"""A health check by HTTP as the kubelet makes it: without a certificate of its own, and without verifying the other."""


@dataclass
class Pod:
    """One pod of a workload.

    Attributes:
        folder: Its volumes are in it.
    """

    workload: Workload
    name: str
    address: str
    folder: Path
    secrets: dict[str, dict[str, bytes]]
    chart: Chart

    @property
    def environ(self) -> dict[str, str]:
        """The environment of its container, as Kubernetes expands it."""
        fields = {"status.podIP": self.address, "metadata.name": self.name}
        found: dict[str, str] = {}
        for entry in self.workload.container["env"]:
            source = entry.get("valueFrom", {})
            if "fieldRef" in source:
                value = fields[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                value = self.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]].decode()
            else:
                value = entry["value"]
            found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
        return found

    @property
    def user(self) -> tuple[int, int]:
        security = self.workload.pod["securityContext"]
        return security["runAsUser"], security["runAsGroup"]

    def how(self, network: Network, hosts: Path) -> dict[str, Any]:
        """Returns how its processes run."""
        bound = {"/etc/hosts": hosts}
        for mount in self.workload.container["volumeMounts"]:
            bound[mount["mountPath"]] = self._volume(self.workload.volume(mount["name"]))
        return {
            "network": network, "user": self.user, "groups": [self.workload.pod["securityContext"]["fsGroup"]],
            "bound": bound, "read_only": self.workload.container["securityContext"]["readOnlyRootFilesystem"],
        }  # fmt: skip

    def _volume(self, volume: Manifest) -> Path:
        """Returns the folder of a volume, made the first time: root owns it, and the group of the pod may read it."""
        folder = self.folder / volume["name"]
        if folder.exists():
            return folder
        folder.mkdir()
        group, mode, files = self.workload.pod["securityContext"]["fsGroup"], 0o644, dict[str, bytes]()
        if "secret" in volume:
            known, mode = self.secrets[volume["secret"]["secretName"]], volume["secret"]["defaultMode"]
            files = {item["path"]: known[item["key"]] for item in volume["secret"]["items"]}
        elif "configMap" in volume:
            (config,) = [o for o in self.chart.of("ConfigMap") if o["metadata"]["name"] == volume["configMap"]["name"]]
            files = {name: text.encode() for name, text in config["data"].items()}
        else:
            assert "emptyDir" in volume
        for name, data in files.items():
            (folder / name).write_bytes(data)
            (folder / name).chmod(mode)
            os.chown(folder / name, 0, group)
        folder.chmod(0o2775)
        os.chown(folder, 0, group)
        return folder

    def check(self, probe: Manifest, image: Image, network: Network, hosts: Path) -> list[str]:
        """Returns the command of a health check."""
        if "exec" in probe:
            return image.words(probe["exec"]["command"], self.environ, **self.how(network, hosts))
        asked = probe["httpGet"]
        url = f"{asked['scheme'].lower()}://{self.address}:{self.workload.ports[asked['port']]}{asked['path']}"
        return [*network.enter, sys.executable, "-c", _ASK, url]


def certificate(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    ca, _ = make_ca(folder)
    cert, key = make_certificate("part", hosts_of_certificate(), folder)
    return {"ca.crt": ca.read_bytes(), "tls.crt": cert.read_bytes(), "tls.key": key.read_bytes()}


@pytest.mark.parametrize("values", [{}, TLS], ids=["plain", "tls"])
def test_the_pods_answer_a_question_together(image: Image, tmp_path: Path, values: dict[str, Any]) -> None:
    chart = Chart([one for one in yaml.safe_load_all(text_of(values)) if one], is_vllm=False)
    secrets = {"embferry-keys": {"cluster-key": Key.new().written().encode(), "api-key": API_KEY.encode()}}
    if values:
        secrets["embferry-tls"] = certificate(tmp_path / "certificates")
    tmp_path.chmod(0o755)
    pods: dict[str, Pod] = {}
    names = ["127.0.0.1 localhost"]
    for number, (part, workload) in enumerate(chart.workloads.items(), 10):
        folder = tmp_path / part
        folder.mkdir()
        name = f"{workload.name}-0" if workload.manifest["kind"] == "StatefulSet" else f"{workload.name}-7c9f"
        pods[part] = Pod(workload, name, f"10.244.1.{number}", folder, secrets, chart)
        service = f"{workload.name}.{NAMESPACE}.svc"
        names.append(f"{pods[part].address} {service} {name}.{service}")
    hosts = tmp_path / "hosts"
    hosts.write_text("\n".join(names) + "\n")
    running: dict[str, Running] = {}
    with ExitStack() as stack:
        network = stack.enter_context(Network(*(pod.address for pod in pods.values())))
        for part, pod in pods.items():
            container = pod.workload.container
            assert "command" not in container
            log = tmp_path / f"{part}.log"
            command = image.entry(container["args"])
            running[part] = image.start(stack, log, command, pod.environ, **pod.how(network, hosts))

        def passes(part: str, kind: str) -> bool:
            assert running[part].process.poll() is None, running[part].text
            check = pods[part].check(pods[part].workload.container[kind], image, network, hosts)
            return subprocess.run(check, capture_output=True, check=False).returncode == 0

        for part in pods:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                until(lambda part=part, kind=kind: passes(part, kind))  # type: ignore[misc]
        router = (
            f"{'https' if values else 'http'}://{NAME}-router.{NAMESPACE}.svc:{pods['router'].workload.ports['http']}"
        )
        client = {"EMBFERRY_ROUTER_API_KEY": API_KEY}
        bound = {"/etc/hosts": hosts, "/media": ROOT / "examples/media"}
        how: dict[str, Any] = {"network": network, "bound": bound, "temporary": ["/tmp"]}
        if values:
            (tmp_path / "ca.crt").write_bytes(secrets["embferry-tls"]["ca.crt"])
            how["bound"] = {**bound, "/ca.crt": tmp_path / "ca.crt"}
            client["EMBFERRY_TLS_CA"] = "/ca.crt"
        told = ["embferry", "status", "--url", router, "--encoders", "1", "--languages", "1"]
        status = image.words(told, client, **how)
        until(lambda: subprocess.run(status, capture_output=True, check=False).returncode == 0)
        client.pop("EMBFERRY_TLS_CA", None)  # the command of the notes names it
        asked = [{"picture.png": "/media/coins.png", "ca.crt": "/ca.crt"}.get(word, word) for word in asking(values)]
        answer = image.run([*asked[:-1], "How many circles are there?", "-v"], client, **how)
        assert answer.splitlines()[0] == "4"
        assert "tcp" in answer
        for one in running.values():
            one.terminate()
        for part, pod in pods.items():
            before = int(
                pod.workload.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0, 0])[1]
            )
            assert running[part].end(pod.workload.pod["terminationGracePeriodSeconds"] - before) == 0, running[
                part
            ].text


def test_the_keys_of_the_documentation_are_keys() -> None:
    """``openssl rand -hex 32`` makes what ``embferry keys new`` makes."""
    assert "--from-literal=cluster-key=$(openssl rand -hex 32)" in PAGE
    assert re.fullmatch(r"[0-9a-f]{64}", Key.new().written())
