"""Starlette's application without its redirects: a path with a slash too many is another path."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette


def exact_paths_app(**arguments: Any) -> Starlette:
    """Returns the application. ``arguments`` are Starlette's.

    Its redirects would send a client, with its question and its pictures, to the host that a ``Host`` header names.
    """
    app = Starlette(**arguments)
    app.router.redirect_slashes = False
    return app
