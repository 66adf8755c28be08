"""Odd values give manifests that Kubernetes takes, or a sentence that names them, and no trace of a template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import pytest
import yaml

from tests.deploy.chart import CHART, RefusedError, chart_of, text_of
from tests.deploy.test_chart_refusals import NAMED, VLLM, at, merged, refusals

pytestmark = pytest.mark.deploy
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())

GOVERNING = ("engine", "scaling.enabled")
"""Values with which others are needed too."""
ODD: tuple[Any, ...] = (None, "", -1, 1.5, True, "an odd value", "123", ["a"], {"a": 1})


def places(values: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yields the place of every value, with dots."""
    for key, value in values.items():
        yield place + key
        if isinstance(value, dict):
            yield from places(value, f"{place}{key}.")


def without(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns values without that at a place, as Helm does where it is null."""
    key, _, rest = place.partition(".")
    kept = {name: value for name, value in values.items() if name != key or rest}
    return kept | ({key: without(values[key], rest)} if rest else {})


def taken_by_the_schema(base: Mapping[str, Any], value: object) -> list[str]:
    """Returns the places at which the schema takes a value."""
    import jsonschema

    schema = jsonschema.Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))
    whole = merged(DEFAULTS, base)

    def with_it(place: str) -> dict[str, Any]:
        return without(whole, place) if value is None else merged(whole, at(place, value))

    return [place for place in places(DEFAULTS) if schema.is_valid(with_it(place))]


@pytest.mark.parametrize("engine", ["embferry", "vllm"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values_give_manifests_or_a_sentence_that_names_them(engine: str, value: object) -> None:
    """All that the schema takes at once; then without those that the chart refuses, each with its name."""
    import kubernetes_validate

    base = VLLM if engine == "vllm" else {}
    taken = [place for place in taken_by_the_schema(base, value) if place not in GOVERNING]
    assert taken or value in (-1, 1.5), "most kinds of values have some place"
    for _ in range(2):
        values = reduce(merged, [at(place, value) for place in taken], base)
        try:
            manifests = chart_of(values).manifests
            break
        except RefusedError:
            refused = {re.split(r"[: ]", one)[0] for one in refusals(values)}
            named = {place for place in taken if {place, place.rpartition(".")[0]} & refused}
            assert named, refused
            taken = [place for place in taken if place not in named]
    for manifest in manifests:
        if manifest["kind"] not in ("PodMonitor", "ScaledObject"):
            kubernetes_validate.validate(manifest, "1.37", strict=True)


def leaves(of: object) -> Iterator[object]:
    """Yields every value in manifests that holds no others."""
    if isinstance(of, dict | list):
        for one in of.values() if isinstance(of, dict) else of:
            yield from leaves(one)
    else:
        yield of


def test_names_that_yaml_reads_as_something_else_stay_names() -> None:
    import kubernetes_validate

    named = (*NAMED, "model.hubSecret", "model.cacheClaim", "encode.runtimeClassName", "language.runtimeClassName")
    for name in ("123", "true", "null", "0x1f"):
        chart = chart_of(reduce(merged, [at(place, name) for place in named], {})).manifests
        for manifest in chart:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
        assert [*leaves(chart)].count(name) >= len(named)


def test_long_names_of_releases_do_not_meet() -> None:
    """They are cut, and Helm takes releases of up to 53 characters."""
    names = set[str]()
    for end in ("a", "b", "-a"):
        manifests = list(yaml.safe_load_all(text_of({}, release="r" * 50 + end)))
        made = {(one["kind"], one["metadata"]["name"]) for one in manifests if one}
        assert max(len(name) for _, name in made) <= 52, "what a StatefulSet may have, with the label of a revision"
        names |= {name for _, name in made}
        assert len(manifests) > len({name for _, name in made}) > 3
    assert len({name for name in names if name.endswith("-encode")}) == 3


def test_the_name_of_a_model_is_no_variable_of_the_pod() -> None:
    """Kubernetes puts the value of a variable in place of its name in arguments."""
    for workload in chart_of(merged(VLLM, {"model": {"name": "a/$(HF_HOME)"}})).workloads.values():
        if workload.is_vllm:
            words = [word.replace("$$(", "(") for word in workload.container["args"]]
            assert words[1:4] == ["a/(HF_HOME)", "--served-model-name", "(HF_HOME)"]
