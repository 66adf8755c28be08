"""Writes deploy/grafana/embferry.json, the dashboard, from the table below. With ``--check``, only compares it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from generated_page import write_or_check

DASHBOARD = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "embferry.json"
SELECTOR = 'job=~"$job",instance=~"$instance"'
"""Variables of the dashboard, which every query has."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8
SCHEMA = 38
"""The version of the format that Grafana 10.0 writes; later ones read it."""


class Panel(NamedTuple):
    """A graph.

    Attributes:
        unit: Grafana's name of the unit: "short" for counts.
        queries: Expressions by their legends, in which ``{{label}}`` stands for the value of a label.
        about: What to look for.
    """

    title: str
    unit: str
    queries: dict[str, str]
    about: str = ""


def now(metric: str, *by: str, where: str = "") -> str:
    """Returns the sum of a gauge, for each value of the labels ``by``. ``where`` selects by other labels."""
    return f"sum{_by(by)} ({metric}{_selected(where)})"


def rate(metric: str, *by: str, where: str = "") -> str:
    """Returns how much a counter rises each second, as :func:`now`."""
    return f"sum{_by(by)} (rate({metric}{_selected(where)}[$__rate_interval]))"


def quantiles(metric: str) -> dict[str, str]:
    """Returns median and 95th percentile of a histogram."""
    bucket = rate(f"{metric}_bucket", "le")
    return {name: f"histogram_quantile({q}, {bucket})" for name, q in (("median", 0.5), ("95 %", 0.95))}


def share(part: str, *whole: str) -> str:
    """Returns a part of the sum of several expressions; nothing while the sum is 0."""
    return f"{part} / ({' + '.join(whole)} > 0)"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _selected(where: str) -> str:
    return "{" + ",".join(filter(None, (SELECTOR, where))) + "}"


HITS, MISSES = (
    rate("embferry_encode_cache_lookups_total", where=f'outcome="{outcome}"') for outcome in ("hit", "miss")
)
FOUND, ABSENT = (rate(f"embferry_encode_shared_cache_{name}_total") for name in ("hits", "misses"))
ROWS = {
    "Requests": [
        Panel(
            "Chat requests",
            "reqps",
            {
                "ended": rate("embferry_router_chat_seconds_count"),
                "client left": rate("embferry_router_chat_aborted_total"),
            },
        ),
        Panel("Under way", "short", {"chat requests": now("embferry_router_chat_in_flight")}),
        Panel(
            "Errors by code",
            "reqps",
            {"{{code}}": rate("embferry_router_chat_errors_total", "code")},
            "docs/errors.md says what each code means, and what to do.",
        ),
        Panel(
            "Responses by status",
            "reqps",
            {"{{path}} {{status}}": rate("embferry_router_http_requests_total", "path", "status")},
        ),
        Panel("Time to the first token", "s", quantiles("embferry_router_chat_first_token_seconds")),
        Panel("Time to the end of the answer", "s", quantiles("embferry_router_chat_seconds")),
    ],
    "Fleet": [
        Panel(
            "Workers that can be asked",
            "short",
            {"{{role}}": f"min by (role) (embferry_router_workers{{{SELECTOR}}})"},
            "As the router that sees the fewest sees them; instances of vLLM count as workers.",
        ),
        Panel(
            "Tried again",
            "ops",
            {
                "second attempts": rate("embferry_router_chat_second_attempts_total"),
                "encodes tried again": rate("embferry_router_encode_retries_total"),
                "failovers: {{outcome}}": rate("embferry_router_failovers_total", "outcome"),
                "sent undivided": rate("embferry_router_fallbacks_total"),
            },
            "Requests that a failure has delayed. Failovers and requests sent undivided are those before vLLM.",
        ),
        Panel(
            "Failed and damaged",
            "ops",
            {
                "failed calls: {{role}}": rate("embferry_router_worker_failures_total", "role"),
                "damaged messages: {{role}}": rate("embferry_router_damaged_messages_total", "role"),
            },
        ),
    ],
    "Encode": [
        Panel(
            "Requests in encode workers",
            "short",
            {"{{state}}": now("embferry_encode_rooms", "state")},
            "bootstrapping: no language worker has asked for it yet. inflight: its embedding is being sent.",
        ),
        Panel("Items encoded", "ops", {"{{kind}}": rate("embferry_encode_items_encoded_total", "kind")}),
        Panel(
            "Hits of the caches",
            "percentunit",
            {"own cache": share(HITS, HITS, MISSES), "shared cache": share(FOUND, FOUND, ABSENT)},
        ),
        Panel("Time of the vision encoder for one item", "s", quantiles("embferry_encode_encoder_seconds")),
        Panel("Time to decode a picture or video", "s", quantiles("embferry_encode_prepare_seconds")),
        Panel(
            "Time of an encode before vLLM",
            "s",
            quantiles("embferry_router_encode_call_seconds"),
            "As the router sees it.",
        ),
    ],
    "Transfer": [
        Panel(
            "Embeddings received",
            "Bps",
            {"{{transport}}": rate("embferry_language_transfer_bytes_total", "transport")},
        ),
        Panel(
            "Time to the last token of an embedding",
            "s",
            quantiles("embferry_language_transfer_seconds"),
            "From the request on, so the encoder's time is part of it.",
        ),
        Panel(
            "Transfers",
            "ops",
            {"{{phase}}": rate("embferry_language_transfers_total", "phase")},
            "Many resumed ones for each initial one: the pool is small for what arrives.",
        ),
        Panel(
            "Failures by cause",
            "ops",
            {
                "language: {{code}}": rate("embferry_language_errors_total", "code"),
                "encode: {{outcome}}": rate(
                    "embferry_encode_rooms_ended_total", "outcome", where='outcome!="delivered"'
                ),
            },
        ),
        Panel(
            "Blocks of the receive pools",
            "short",
            {"{{state}}": now("embferry_language_pool_blocks", "state")},
            "No free ones for long: a larger pool makes transfers faster.",
        ),
        Panel(
            "Transports that have failed for good",
            "short",
            {"{{instance}} {{transport}}": now("embferry_worker_transport_lost", "instance", "transport")},
        ),
    ],
    "Connectors under vLLM and SGLang": [
        Panel(
            "Embeddings at the consumer",
            "ops",
            {
                "loads: {{outcome}}": rate("embferry_connector_transfers_total", "outcome"),
                "found there": rate("embferry_connector_cache_hits_total"),
                "encoded there": rate("embferry_connector_encoded_here_total"),
            },
            "Encoded there: the embedding could not be obtained. The log of the consumer has the error.",
        ),
        Panel("Time until an embedding has arrived", "s", quantiles("embferry_connector_load_seconds")),
        Panel(
            "Received",
            "Bps",
            {
                "over transports": rate("embferry_connector_wire_bytes_total"),
                "damaged, or a second time": rate("embferry_connector_repeated_bytes_total"),
            },
        ),
        Panel(
            "Items at the producer",
            "ops",
            {
                "encoded": rate("embferry_connector_items_encoded_total"),
                "offered": rate("embferry_connector_items_offered_total"),
                "offered without an encode": rate("embferry_connector_encodes_saved_total"),
            },
        ),
        Panel(
            "Failures by cause",
            "ops",
            {
                "not obtained: {{code}}": rate("embferry_connector_failures_total", "code"),
                "not offered: {{code}}": rate("embferry_connector_items_refused_total", "code"),
                "producer lost: {{code}}": rate("embferry_connector_losses_total", "code"),
                "failover: {{outcome}}": rate("embferry_connector_failovers_total", "outcome"),
            },
        ),
        Panel(
            "Bytes held",
            "bytes",
            {
                "offered": now("embferry_connector_offered_bytes"),
                "kept for later requests": now("embferry_connector_kept_bytes"),
            },
        ),
    ],
    "Processes": [
        Panel(
            "Resident memory",
            "bytes",
            {"{{part}} {{instance}}": now("process_resident_memory_bytes", "part", "instance")},
        ),
        Panel(
            "Bytes held for requests",
            "bytes",
            {"{{part}} {{instance}}": now("embferry_process_held_bytes", "part", "instance")},
            "Bodies, media, prompts and embeddings. docs/operations.md, Limits, has the bounds.",
        ),
        Panel(
            "Processors in use",
            "short",
            {"{{part}} {{instance}}": rate("process_cpu_seconds_total", "part", "instance")},
        ),
        Panel("Open files", "short", {"{{part}} {{instance}}": now("process_open_fds", "part", "instance")}),
        Panel(
            "Refused, closed and dropped",
            "ops",
            {
                "requests without a proof": rate("embferry_process_unproved_requests_refused_total"),
                "clients over their limits": rate("embferry_router_client_requests_total", where='outcome="refused"'),
                "data connections": rate("embferry_worker_data_connections_closed_total"),
                "control messages: {{outcome}}": rate("embferry_worker_control_messages_total", "outcome"),
                "log lines": rate("embferry_process_log_lines_dropped_total"),
            },
        ),
        Panel("Leases at the bootstrap server", "short", {"{{role}}": now("embferry_bootstrap_workers", "role")}),
    ],
}
"""The panels of each row, three beside each other."""


def dashboard() -> dict[str, Any]:
    """Returns the dashboard."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []})
        for number, panel in enumerate(row):
            width = COLUMNS // 3
            place = {"x": number % 3 * width, "y": top + 1 + number // 3 * HEIGHT, "w": width, "h": HEIGHT}
            panels.append(_drawn(panel, place))
        top += 1 + -(-len(row) // 3) * HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "title": "embferry",
        "uid": "embferry",
        "description": "Routers, workers and connectors of embferry",
        "tags": ["embferry"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": variables()},
        "panels": panels,
    }


def variables() -> list[dict[str, Any]]:
    """Returns the choices at the head of the dashboard."""
    jobs = 'label_values({__name__=~"embferry_.+"}, job)'
    instances = 'label_values({__name__=~"embferry_.+",job=~"$job"}, instance)'
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _choice("job", "Job", jobs),
        _choice("instance", "Instance", instances),
    ]


def _choice(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _drawn(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": DATASOURCE, "editorMode": "code", "range": True}
        | {"expr": query, "legendFormat": legend}
        for number, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {"lineWidth": 1, "fillOpacity": 10, "showPoints": "auto", "spanNulls": False},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


if __name__ == "__main__":
    sys.exit(write_or_check(DASHBOARD, json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"))
