"""Spans of requests, for a collector of OpenTelemetry. Only :mod:`.otlp` imports OpenTelemetry, and only when asked."""
