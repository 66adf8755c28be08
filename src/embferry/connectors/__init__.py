"""Connectors that run this library inside other inference engines."""
