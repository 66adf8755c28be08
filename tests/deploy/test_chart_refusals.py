"""Values that cannot work are refused by Helm, with a sentence that says what is wrong."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import pytest
import yaml

from embferry.serve.config_load import env_name
from tests.deploy.chart import (
    GPU_MODEL,
    RELEASE,
    VALUE_SETS,
    RefusedError,
    chart_of,
    rendered,
    text_of,
)

pytestmark = pytest.mark.deploy
WORKERS = ("encode", "language")
PARTS = ("router", "bootstrap", *WORKERS)
VLLM: dict[str, Any] = {"engine": "vllm", "model": {"name": GPU_MODEL}, "encode": {"gpus": 1}, "language": {"gpus": 1}}


def at(place: str, value: Any) -> dict[str, Any]:
    """Returns values with one at a place with dots."""
    for key in reversed(place.split(".")):
        value = {key: value}
    return dict(value)


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns both sets of values in one, as Helm merges them."""
    both = dict(one)
    for key, value in other.items():
        both[key] = merged(both[key], value) if isinstance(both.get(key), dict) and isinstance(value, dict) else value
    return both


def refusals(values: Mapping[str, Any], release: str = RELEASE) -> list[str]:
    """Returns the sentences of the chart about values; fails if it renders them."""
    with pytest.raises(RefusedError) as refused:
        text_of(values, release=release)
    head, _, rest = str(refused.value).partition("values that cannot work:\n")
    assert rest, head
    return re.findall(r"^  - (.+)$", rest, re.MULTILINE)


BAD_NAMES = ("x\nhostNetwork: true", "a: b", "a}, b: {c: d", "$(KEY)", '"', "UPPER", "a" * 300)
NAMED = (
    "serviceAccountName",
    "keys.secretName",
    "tls.secretName",
    "model.claim",
    *(f"{part}.{kind}ClassName" for part in ("router", "encode") for kind in ("priority", "runtime")),
)
"""Some of the values that name an object of the cluster, and stand in manifests without quotes."""


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"encode": {"replica": 2}}, "/encode"),
        ({"engine": "sglang"}, "/engine"),
        ({"router": {"port": 80}}, "/router/port"),
        ({"scaling": {"enabled": True}}, "scaling.prometheusUrl"),
        ({"encode": {"scaling": {"min": 0}}}, "/encode/scaling/min"),
        ({"host": "127.0.0.1"}, "/host"),
        (merged(VLLM, {"encode": {"replicas": 10**6}}), "/encode/replicas"),
        ({"podLabels": {"team": "a b"}}, "/podLabels/team"),
        ({"router": {"nodeSelector": {"pool": "a b"}}}, "/router/nodeSelector/pool"),
        ({"encode": {"nodeSelector": {"a b": "c"}}}, "/encode/nodeSelector"),
        ({"encode": {"nodeSelector": {"gpu": True}}}, "/encode/nodeSelector/gpu"),
        ({"language": {"tolerations": [{"key": "gpu", "operator": "Equals"}]}}, "/language/tolerations/0/operator"),
        ({"encode": {"affinity": {"nodeaffinity": {}}}}, "/encode/affinity"),
        ({"encode": {"env": [{"name": "A", "value": 1}]}}, "/encode/env/0/value"),
        ({"encode": {"volumeMounts": [{"name": "shared"}]}}, "/encode/volumeMounts/0"),
        ({"encode": {"startupSeconds": 10**18}}, "/encode/startupSeconds"),
        *((at(place, text), f"/{place.replace('.', '/')}") for place in NAMED for text in BAD_NAMES),
        ({"image": {"tag": '1"\n          securityContext: {privileged: true}'}}, "/image/tag"),
        ({"model": {"claim": "c", "mountPath": "/x, subPath: y"}}, "/model/mountPath"),
    ],
)
def test_names_types_and_bounds_are_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(why)):
        text_of(values)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (merged(VLLM, {"model": {"name": "shapes"}}), "model.name: vLLM cannot serve the packaged model shapes"),
        (merged(VLLM, {"router": {"replicas": 2}}), "router.replicas: instances of vLLM report to one router"),
        ({"transports": ["shm"]}, "transports: shm works within a pod only; add one that works between pods"),
        (merged(VLLM, {"transports": ["shm"]}), "transports: shm works within a pod only"),
        ({"podLabels": {"helm.sh/chart": "x"}}, "podLabels.helm.sh/chart: the chart sets labels of this kind"),
        ({"podLabels": {"app.kubernetes.io/name": "x"}}, "podLabels.app.kubernetes.io/name: the chart sets labels"),
        *((at(f"{part}.gpus", 1), f"{part}.gpus: our own engine computes on CPUs") for part in WORKERS),
        *((at(f"{part}.scaling", {"min": 5}), f"{part}.scaling: min 5 is more than max 4") for part in WORKERS),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values: dict[str, Any], why: str) -> None:
    (said,) = refusals(values)
    assert said.startswith(why)


def test_a_release_with_a_dot_is_refused() -> None:
    """Services are named after it, and their names are labels of the DNS."""
    assert "has a dot in its name" in refusals({}, release="my.release")[0]


def test_every_wrong_value_is_told_at_once() -> None:
    wrong = {"transports": ["shm"], "encode": {"gpus": 1}, "settings": {"router": {"port": 9}}}
    assert len(refusals(wrong)) == 3


@pytest.mark.parametrize("part", WORKERS)
def test_vllm_asks_how_many_gpus_there_are(part: str) -> None:
    without = merged(VLLM, {part: {"gpus": None}})
    (said,) = refusals(without)
    assert said.startswith(f"{part}.gpus: say how many GPUs each pod has")
    for answer in ({"gpus": 0}, {"resources": {"limits": {"amd.com/gpu": 2}}}):
        limits = chart_of(merged(without, {part: answer})).workloads[part].container["resources"]["limits"]
        assert "nvidia.com/gpu" not in limits


@pytest.mark.parametrize("image", ["image", "vllm.image"])
@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"repository": "registry:5000/team/eyes:7"}, "contains a tag; give it as {image}.tag=7"),
        ({"repository": "eyes:7"}, "contains a tag"),
        ({"repository": "registry/eyes@sha256:" + 64 * "0"}, "contains a digest; give it with the tag"),
        ({"tag": ":7"}, "is no tag"),
        ({"tag": "sha256:" + 64 * "0"}, "is no tag"),
        ({"tag": "7@sha256:0"}, "is no tag"),
    ],
)
def test_the_name_of_an_image_and_its_tag_are_two_values(image: str, given: dict[str, str], why: str) -> None:
    (said,) = refusals(merged(VLLM, at(image, given)))
    assert said.startswith(f"{image}.{next(iter(given))}: ")
    assert why.format(image=image) in said


def test_registries_with_a_port_and_digests_after_a_tag_are_taken() -> None:
    digest = "0.2.0@sha256:" + 64 * "a"
    chart = chart_of({"image": {"repository": "registry:5000/team/eyes", "tag": digest}})
    assert {one.container["image"] for one in chart.workloads.values()} == {f"registry:5000/team/eyes:{digest}"}


QUANTITIES = {
    "24Gi": 24 << 30, "24G": 24 * 10**9, "1.5Ki": 1536, ".5k": 500, "7.": 7, "1e3": 1000, "2E3": 2000, "2E": 2 * 10**18,
    "1500m": 1.5, "3u": 3e-6, "3n": 3e-9, "9Ti": 9 << 40, "9Pi": 9 << 50, "9Ei": 9 << 60, "9T": 9e12, "9P": 9e15,
    "9M": 9e6, "9Mi": 9 << 20, "4": 4,
}  # fmt: skip
"""Texts that Kubernetes reads as quantities, and the amounts."""
NO_QUANTITIES = (
    "24GB",
    "24gb",
    "24g",
    "24 Gi",
    "10K",
    "-1Gi",
    "1.2.3Gi",
    "Gi",
    "",
    "1e",
    "8Gib",
    "8Gi\n",
    "8Gi, medium: Memory",
)
PLACES = ("model.cacheSize", "vllm.sharedMemory", *(f"{part}.resources.limits.memory" for part in PARTS))


@pytest.mark.parametrize("place", PLACES)
def test_quantities_are_refused_where_kubernetes_would_not_read_them(place: str) -> None:
    (said,) = refusals(at(place, "24GB"))
    assert said.startswith(f'{place}: "24GB" is no quantity of Kubernetes; write a number with a unit such as Mi, Gi')


def numbered(values: Iterable[str | float]) -> dict[str, str | float]:
    """Returns a resource for each of the values."""
    return {f"n{number}": value for number, value in enumerate(values)}


def test_only_what_kubernetes_reads_is_a_quantity() -> None:
    text_of(at("encode.resources.limits", numbered([*QUANTITIES, 4, 0.5, 6.5e10])))
    said = refusals(at("encode.resources.limits", numbered(NO_QUANTITIES)))
    assert {one.partition(" is no quantity")[0] for one in said} == {
        f"encode.resources.limits.{name}: {json.dumps(text)}" for name, text in numbered(NO_QUANTITIES).items()
    }


@pytest.mark.parametrize("part", PARTS)
def test_a_limit_below_its_request_is_refused(part: str) -> None:
    """Quantities that are next to each other in size; none is refused the other way round."""
    ordered = sorted(QUANTITIES, key=QUANTITIES.__getitem__)
    assert len({*QUANTITIES.values()}) == len(ordered)
    pairs = [*itertools.pairwise(ordered)]
    less, more = numbered(one for one, _ in pairs), numbered(other for _, other in pairs)
    text_of(at(f"{part}.resources", {"requests": less, "limits": more}))
    said = refusals(at(f"{part}.resources", {"requests": more, "limits": less}))
    assert {one.partition(";")[0] for one in said} == {
        f"{part}.resources.limits.{name}: the limit {less[name]} is below the request {more[name]}" for name in less
    }


def test_equal_quantities_and_numbers_are_compared() -> None:
    alike = {"a": "1Gi", "b": "1", "c": 2, "d": 6.5e10}, {"a": "1024Mi", "b": "1000m", "c": "2", "d": "65G"}
    text_of(at("router.resources", {"requests": alike[0], "limits": alike[1]}))
    text_of(at("router.resources", {"requests": alike[1], "limits": alike[0]}))
    (said,) = refusals(at("router.resources", {"limits": {"memory": 7}}))
    assert said.startswith("router.resources.limits.memory: the limit 7 is below the request 2Gi")


@pytest.mark.parametrize(
    ("values", "places"),
    [
        *((merged(VLLM, {part: {"port": 9100}}), (f"{part}.port", "vllm.metricsPort")) for part in WORKERS),
        (
            merged(VLLM, {"vllm": {"connector": {"ranks_port": 9100}}}),
            ("vllm.connector.ranks_port", "vllm.metricsPort"),
        ),
        ({"settings": {"transfer": {"http_port": 8001}}}, ("settings.transfer.http_port", "encode.port")),
    ],
)
def test_two_equal_ports_of_a_pod_are_refused(values: dict[str, Any], places: tuple[str, str]) -> None:
    (said,) = refusals(values)
    assert all(place in said for place in places)
    assert said.endswith("in the same pod; choose another port")


def test_equal_ports_of_different_pods_are_taken() -> None:
    text = text_of(merged(VLLM, {part: {"port": 8000} for part in WORKERS}))
    assert text.count("containerPort: 8000") == 1 + len(WORKERS), "the router's and those of the workers"


def paths(settings: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the place of every setting."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from paths(value, (*place, key))
        else:
            yield (*place, key)


SECRETS = ("cluster_key", "security.cluster_key", "security.cluster_key_file", "router.api_key")
TRUST = ("security.tls_ca", "security.tls_cert", "security.tls_key", "security.tls_check_hosts", "advertise_host")


@pytest.mark.parametrize("name", ["all", "vllm-all"])
def test_settings_that_the_chart_makes_are_refused_with_the_value_to_use(name: str) -> None:
    users = {*paths(VALUE_SETS[name]["settings"]), ("log_format",)}
    made = {".".join(place) for place in {*paths(yaml.safe_load(rendered(name).settings))} - users}
    assert {"model", "host", "router.port"} <= made
    owned = {*made, *SECRETS, *TRUST}
    given = reduce(merged, [at(f"settings.{place}", "anything") for place in owned], VALUE_SETS[name])
    said = dict(one.split(": ", 1) for one in refusals(given))
    assert said.keys() == {f"settings.{place}" for place in owned}
    for place, instead in said.items():
        is_secret = place.removeprefix("settings.") in SECRETS
        assert re.search("Secret keys.secretName" if is_secret else "^use |^leave it out; ", instead)


@pytest.mark.parametrize("name", ["all", "vllm-all"])
def test_variables_that_the_chart_sets_are_refused(name: str) -> None:
    workloads = rendered(name).workloads
    entries = {part: {entry["name"] for entry in one.container["env"]} for part, one in workloads.items()}
    made = {key for keys in entries.values() for key in keys if key.startswith("EMBFERRY_")} - {"EMBFERRY_LOG_LEVEL"}
    made |= {env_name(("router", "port")), env_name(("router", "api_key")), "EMBFERRY_CLUSTER_KEY"}
    for part in PARTS:
        own = made | entries.get(part, set()) - {"EMBFERRY_LOG_LEVEL"}
        env = [{"name": key, "value": "any"} for key in (*sorted(own), "OURS", "OURS")]
        said = refusals(merged(VALUE_SETS[name], {part: {"env": env}}))
        assert {tuple(one.split(": ")[:2]) for one in said} == {(f"{part}.env", key) for key in {*own, "OURS"}}


def test_a_token_of_the_hub_is_no_value() -> None:
    given = {"encode": {"env": [{"name": "HF_TOKEN", "value": "secret"}]}, "vllm": {"extraArgs": ["--hf-token=secret"]}}
    said = refusals(merged(VLLM, given))
    assert [one.rpartition(": ")[2] for one in said] == ["put it into a Secret, and use model.hubSecret"] * 2
    of_secret = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}
    text_of(merged(VLLM, {"encode": {"env": [of_secret]}}))


def test_settings_of_the_connector_and_arguments_that_the_chart_makes_are_refused() -> None:
    made: set[str] = set()
    options: set[str] = set()
    for part in WORKERS:
        words = rendered("vllm-all").workloads[part].container["args"]
        transfer = json.loads(words[words.index("--ec-transfer-config") + 1])
        made |= transfer["ec_connector_extra_config"].keys()
        options |= {word for word in words if word.startswith("--")}
    made -= VALUE_SETS["vllm-all"]["vllm"]["connector"].keys()
    said = refusals(merged(VLLM, {"vllm": {"connector": dict.fromkeys(made, "anything")}}))
    assert {one.partition(":")[0] for one in said} == {f"vllm.connector.{key}" for key in made}
    options -= {"--gpu-memory-utilization", "--enable-mm-embeds", "--middleware"}
    options -= {"--tensor-parallel-size", "--otlp-traces-endpoint"}  # others in their place can work
    assert {"--host", "--port"} <= options
    for place in ("extraArgs", "encodeArgs", "languageArgs"):
        words = sorted({*options, "--api-key=secret"})
        said = refusals(merged(VLLM, {"vllm": {place: words}}))
        assert [one.rpartition(": ")[0] for one in said] == [
            f"vllm.{place}: {word.partition('=')[0]}" for word in words
        ]
    other_ways = ["--served_model_name", "--ec-transfer-config.ec_role=ec_both", "--port=9"]  # vLLM reads them so
    assert len(refusals(merged(VLLM, {"vllm": {"extraArgs": other_ways}}))) == 3
