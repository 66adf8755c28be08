"""Messages of ``/activity``, as a router writes them."""

from __future__ import annotations

import json
from typing import Any

from embferry.cli.activity.state import Activity
from embferry.cli.activity.told import Told, read


def worker(id: str, role: str = "", **changes: Any) -> dict[str, Any]:
    """Returns a worker that is up."""
    known = {"id": id, "role": role or id.rstrip("0123456789"), "url": f"http://10.0.0.1:9000/{id}", "up": True}
    return known | {"models": ["shapes"], "in_flight": 0, "load": 0.0, "trouble": ""} | changes


def pool(worker: str, **changes: Any) -> dict[str, Any]:
    """Returns a receive pool of 4 blocks."""
    return {"worker": worker, "url": "", "num_blocks": 4, "available": 3, "used": 1, "quarantined": 0} | changes


def request(number: int, *phases: tuple[str, float, float | None], **changes: Any) -> dict[str, Any]:
    """Returns a request, which has ended if its last phase has."""
    phases = phases or (("fetch", 0.0, None),)
    ended = phases[-1][2]
    known = {"number": number, "path": "/v1/chat/completions", "began": phases[0][1], "ended": ended}
    known |= {"streams": False, "images": 1, "videos": 0, "phases": phases, "encoders": ["encode0"]}
    known |= {"language": "language0", "transfer": None, "attempts": 1, "ttft": None}
    return known | {"outcome": "" if ended is None else "answered"} | changes


def event(id: int, kind: str, at: float = 100.0, **changes: Any) -> dict[str, Any]:
    """Returns an event."""
    return {"id": id, "kind": kind, "request": None, "count": 1, "at": at} | changes


def message(**changes: Any) -> dict[str, Any]:
    """Returns the message of an idle router with a worker of each role."""
    requests = changes.get("requests", [])
    running = [one["number"] for one in requests if one.get("ended", 0.0) is None]
    known = {"now": 100.0, "version": 1, "under_way": len(running), "running": running, "requests": [], "events": []}
    known |= {"samples": {}, "workers": [worker("encode0"), worker("language0")], "pools": [pool("language0")]}
    return known | {"missing": [], "router": "0.1.0", "engine": "embferry", "totals": {}, "first": True} | changes


def told(**changes: Any) -> Told:
    """Returns a message as it is read."""
    return read(json.dumps(message(**changes)).encode())


def activity(**changes: Any) -> Activity:
    """Returns what one message tells; the reader's clock shows 0 then."""
    return Activity(told(**changes), 0.0)


def hostile(value: Any, text: str) -> Any:
    """Returns a message with another text in the place of each."""
    if isinstance(value, dict):
        return {name: hostile(one, text) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(one, text) for one in value]
    return text if isinstance(value, str) else value
