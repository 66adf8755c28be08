"""The chart, rendered by Helm: its manifests are valid, and so are its values."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from typer.main import get_command

from embferry import __version__
from embferry.cli.main import app
from tests.deploy.chart import (
    CHART,
    NAME,
    VALUE_SETS,
    asking,
    chart_of,
    console_blocks,
    helm,
    hosts_of_certificate,
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


@pytest.mark.parametrize(
    ("given", "ours", "vllms"),
    [
        ({"image": {"tag": "7"}}, "embferry:7", "embferry-vllm:7"),
        ({"image": {"tag": "7"}, "vllm": {"image": {"tag": "8"}}}, "embferry:7", "embferry-vllm:8"),
        ({"vllm": {"image": {"tag": "8"}}}, f"embferry:{__version__}", "embferry-vllm:8"),
    ],
)
def test_one_tag_is_that_of_every_pod_unless_vllms_image_has_its_own(
    given: dict[str, Any], ours: str, vllms: str
) -> None:
    for engine in ("default", "vllm"):
        for workload in chart_of({**VALUE_SETS[engine], **given}).workloads.values():
            assert workload.container["image"] == (vllms if workload.is_vllm else ours)


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
    "requests.memory": "100Mi",
    "limits.memory": "7Gi",
}
"""Another value for those that do not take any text or number, by the last words of their place."""


def other(place: tuple[str, ...], value: Any) -> Any:
    """Returns a value that is not the one of the sets that are rendered."""
    key = place[-1]
    for name in (".".join(place[-2:]), key):
        if name in OTHERS:
            return OTHERS[name]
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
        changed = other(place, given if isinstance(given, bool | int) else inner)
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
    lines = "\n".join(console_blocks()).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("helm upgrade")]


REUSE = "--reset-then-reuse-values"
"""With `--reuse-values`, a chart would have the defaults of the release before it, and lack values that are new."""


def test_the_documentation_calls_helm_with_values_that_it_takes() -> None:
    commands = documented()
    assert len(commands) == 5
    known: list[str] = []
    for command in commands:
        words = shlex.split(command)[2:]
        flags = [word for word in words if word not in ("--install", REUSE)]
        assert flags[:2] == ["vision", "deploy/helm/embferry"]
        done = subprocess.run(
            [helm(), "template", flags[0], str(CHART), *(known if REUSE in words else []), *flags[2:]],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        known += [] if REUSE in words else flags[4:]
        assert all(
            one["metadata"]["name"].startswith("vision-embferry") for one in yaml.safe_load_all(done.stdout) if one
        )


def test_the_notes_name_the_secret_and_the_service() -> None:
    notes = text_of({"keys": {"secretName": "our-keys"}}, notes=True).partition("NOTES:")[2]
    for words in ("shapes is served at", f"service/{NAME}-router", "create secret generic our-keys", "cluster-key="):
        assert words in notes


@pytest.mark.parametrize("engine", ["default", "vllm"])
@pytest.mark.parametrize("tls", [{}, {"tls": {"secretName": "our-certificate"}}], ids=["plain", "tls"])
def test_the_notes_ask_in_the_way_that_the_router_answers(engine: str, tls: dict[str, Any]) -> None:
    values = {**VALUE_SETS[engine], **tls}
    words = asking(values)
    arguments = get_command(app).commands["ask"].make_context("ask", words[2:]).params  # type: ignore[attr-defined]
    url = urlsplit(arguments["url"])
    notes = text_of(values, notes=True)
    assert f"port-forward service/{NAME}-router {url.port}:8000" in notes
    assert url.scheme == ("https" if tls else "http")
    if tls:
        assert url.hostname in hosts_of_certificate()
        assert (
            f"get secret our-certificate --output jsonpath='{{.data.ca\\.crt}}' | base64 --decode > {arguments['ca']}"
            in notes
        )
