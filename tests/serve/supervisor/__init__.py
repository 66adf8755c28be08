"""Tests of the supervisor, without real processes."""
