"""``embferry version``."""

from __future__ import annotations

import platform

from embferry import __version__


def command() -> None:
    """Print the version, and those of Python and the system."""
    print(f"embferry {__version__} (Python {platform.python_version()}, {platform.system()} {platform.machine()})")
