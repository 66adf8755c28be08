"""Where a run was made, and with what: as for the transports, and what serves beside it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import msgspec

from .. import machine
from ..machine import PACKAGES
from ..results import Machine

SERVING = ("vllm", "torch", "transformers", "httpx")
ASK = """
import importlib.metadata, json, platform, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))
"""
ASK_S = 30.0


def describe(python: str = sys.executable) -> Machine:
    """``python``: the one whose packages count.

    :raises ValueError: it is none."""
    described = machine.describe()
    if python == sys.executable:
        more = {name: _version(name) for name in SERVING}
        return msgspec.structs.replace(described, versions=described.versions | more)
    shown = {name: distributions[0] for name, distributions in PACKAGES.items()} | {name: name for name in SERVING}
    asked = [python, "-c", ASK, *shown.values()]
    try:
        answer = subprocess.run(asked, stdout=subprocess.PIPE, timeout=ASK_S, check=True).stdout
        versions = dict(zip(("python", *shown), json.loads(answer), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ValueError(f"{python} is no Python: {error}") from error
    return msgspec.structs.replace(described, versions=versions)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
