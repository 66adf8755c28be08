"""The application for Ray Serve: ``embferry.deploy.ray:app``."""

from embferry.deploy.ray.application import app

__all__ = ["app"]
