"""Asserts inside the package's public suite are as talkative as those of the tests themselves."""

import pytest

pytest.register_assert_rewrite("embferry.testing.conformance", "embferry.testing.pair")
