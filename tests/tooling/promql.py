"""Checks expressions in PromQL against the metrics that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import promql_parser as promql

RISES = ("rate", "increase")
"""The functions that read a counter."""


class Metric(NamedTuple):
    """A metric, as a process serves it.

    Attributes:
        type: "counter", "gauge" or "histogram".
        labels: Those of the metric and of its target.
    """

    type: str
    labels: frozenset[str]


class Series(NamedTuple):
    """A name that a selector reads: a metric, or the ``_bucket``, ``_sum`` or ``_count`` of a histogram."""

    rises: bool
    labels: frozenset[str]
    is_bucket: bool = False


def series_of(metrics: Mapping[str, Metric]) -> dict[str, Series]:
    """Returns what can be read, by name."""
    found = {}
    for name, (kind, labels) in metrics.items():
        if kind == "histogram":
            found |= {f"{name}_{end}": Series(True, labels) for end in ("sum", "count")}
            found[f"{name}_bucket"] = Series(True, labels | {"le"}, is_bucket=True)
        else:
            found[name] = Series(kind == "counter", labels)
    return found


class Checker:
    """Checks one expression.

    Attributes:
        faults: What is wrong, a sentence each.
        labels: The labels that its result may have.
        names: The names of metrics and series that it reads.
    """

    def __init__(self, text: str, series: Mapping[str, Series]) -> None:
        self._series = series
        self.faults: list[str] = []
        self.names: set[str] = set()
        self.labels = self._read(promql.parse(text), ())

    def _read(self, expr: promql.Expr, around: tuple[str, ...]) -> frozenset[str]:
        """Returns the labels of an expression within functions and aggregations, the outermost first."""
        match expr:
            case promql.ParenExpr() | promql.UnaryExpr():
                return self._read(expr.expr, around)
            case promql.VectorSelector():
                return self._select(expr, around, has_range=False)
            case promql.MatrixSelector():
                return self._select(expr.vector_selector, around, has_range=True)
            case promql.AggregateExpr():
                return self._aggregate(expr, around)
            case promql.Call():
                return self._call(expr, around)
            case promql.BinaryExpr():
                return self._binary(expr, around)
            case promql.NumberLiteral() | promql.StringLiteral():
                return frozenset()
        raise AssertionError(f"the labels of a {type(expr).__name__} are not known")

    def _select(self, selector: promql.VectorSelector, around: tuple[str, ...], has_range: bool) -> frozenset[str]:
        name = selector.name
        if name is None or name not in self._series:
            self.faults.append(f"there is no metric {name}")
            return frozenset()
        self.names.add(name)
        series, inner = self._series[name], around[-1] if around else ""
        for matcher in selector.matchers.matchers:
            if matcher.name not in series.labels:
                self.faults.append(f"{name} has no label {matcher.name}")
        if series.rises != (has_range and inner in RISES):
            kind = "a counter is" if series.rises else "a gauge is never"
            self.faults.append(f"{name}: {kind} read with {' or '.join(RISES)}")
        if series.is_bucket and "histogram_quantile" not in around:
            self.faults.append(f"{name}: buckets are read with histogram_quantile")
        if not series.is_bucket and "histogram_quantile" in around:
            self.faults.append(f"{name}: histogram_quantile reads buckets")
        return series.labels

    def _aggregate(self, expr: promql.AggregateExpr, around: tuple[str, ...]) -> frozenset[str]:
        below = self._read(expr.expr, (*around, str(expr.op)))
        if expr.modifier is None:
            return frozenset()
        named = frozenset(expr.modifier.labels)
        self.faults += [f"there is no label {label} to group by in {expr}" for label in sorted(named - below)]
        return named if expr.modifier.type == promql.AggModifierType.By else below - named

    def _call(self, expr: promql.Call, around: tuple[str, ...]) -> frozenset[str]:
        labels = frozenset[str]()
        for each in expr.args:
            labels |= self._read(each, (*around, expr.func.name))
        if expr.func.name == "histogram_quantile":
            if "le" not in labels:
                self.faults.append(f"histogram_quantile needs le in {expr}")
            labels -= {"le"}
        return labels

    def _binary(self, expr: promql.BinaryExpr, around: tuple[str, ...]) -> frozenset[str]:
        left, right = self._read(expr.lhs, around), self._read(expr.rhs, around)
        if isinstance(expr.lhs, promql.NumberLiteral) or isinstance(expr.rhs, promql.NumberLiteral):
            return left | right
        return left & right


def renamed(series: Mapping[str, Series]) -> Iterator[tuple[str, dict[str, Series]]]:
    """Yields each name and what there would be if it had another."""
    for name in series:
        yield name, {f"{one}_renamed" if one == name else one: what for one, what in series.items()}
