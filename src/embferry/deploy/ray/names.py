"""The names of the application and of its deployments."""

from __future__ import annotations

from typing import Literal

WorkerRole = Literal["encode", "language"]

APPLICATION = "embferry"
ROUTER = "router"
WORK = "work"
"""The measure that a worker tells Ray's autoscaling: requests that run or wait."""
