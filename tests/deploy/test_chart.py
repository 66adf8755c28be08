"""The chart, rendered by Helm: its manifests are valid, and so are its values."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from embferry import __version__
from tests.deploy.chart import (
    CHART,
    GPU_MODEL,
    NAME,
    VALUE_SETS,
    RefusedError,
    helm,
    rendered,
    text_of,
)

pytestmark = pytest.mark.deploy
every_set = pytest.mark.parametrize("name", VALUE_SETS)
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
OLDEST, NEWEST = "1.27", "1.37"


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


BAD_NAMES = ("x\nhostNetwork: true", "a: b", "a}, b: {c: d", "$(KEY)", '"', "UPPER", "a" * 300)
NAMED = ("serviceAccountName",), ("keys", "secretName"), ("tls", "secretName"), ("model", "claim")
"""Some of the values that name an object of the cluster, and stand in manifests without quotes."""


def nested(place: tuple[str, ...], value: Any) -> Any:
    return nested(place[:-1], {place[-1]: value}) if place else value


INJECTED: list[tuple[dict[str, Any], str]] = [
    (nested(place, text), "/" + "/".join(place))
    for place in (*NAMED, ("encode", "priorityClassName"))
    for text in BAD_NAMES
]


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
        ({"encode": {"scaling": {"min": 5, "max": 2}}}, "encode.scaling.min 5 is more than max 2"),
        ({"engine": "vllm", "model": {"name": GPU_MODEL}, "encode": {"replicas": 10**6}}, "/encode/replicas"),
        ({"podLabels": {"app.kubernetes.io/component": "router"}}, "invalid propertyName"),
        ({"encode": {"startupSeconds": 10**18}}, "/encode/startupSeconds"),
        *INJECTED,
        ({"image": {"tag": '1"\n          securityContext: {privileged: true}'}}, "/image/tag"),
        ({"model": {"claim": "c", "mountPath": "/x, subPath: y"}}, "/model/mountPath"),
    ],
)
def test_helm_refuses_values_that_cannot_work(values: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(why)):
        text_of(values)


def test_a_release_with_a_dot_is_refused() -> None:
    """Services are named after it, and their names are labels of the DNS."""
    command = [helm(), "template", "my.release", str(CHART)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "has a dot" in done.stderr


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
    "min": 2,
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
        return value + 10
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
        name = "vllm-all" if place[0] == "vllm" else "all"
        inner: Any = DEFAULTS
        given: Any = VALUE_SETS[name]
        for key in place:
            inner = inner[key]
            given = given.get(key, {}) if isinstance(given, dict) else {}
        changed = other(place[-1], given if isinstance(given, bool | int) else inner)
        if changed is None or place[-1] == "gpus":  # test_gpus_are_limits_and_vllm_has_shared_memory
            continue
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
