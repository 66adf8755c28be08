"""Tests of ``embferry top``: its screen, with the pilot of textual and in a terminal."""
