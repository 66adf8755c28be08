"""For all tests: the same examples in every run, and asserts of the public suite as talkative as those of the tests."""

import gc
import os
import signal

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("embferry.testing.conformance", "embferry.testing.pair")

settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("EMBFERRY_HYPOTHESIS_PROFILE", "default"))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts a job in the background. The processes of tests would ignore Ctrl-C as well, which tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = (
    "workers/test_what_survives.py",
    "workers/test_processes.py",
    "workers/test_flipped_bits.py",
    "workers/test_kept_embeddings.py",
    "relay/test_relay.py",
)
"""Files of ``make test-sweeps`` that take a minute or more. They run first: the last file that begins runs alone."""
FOUND_BY_TEXT = ("sweeps", "engines")
"""Sets whose files make finds by the text of the mark."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the longest files to the front, and checks that make finds every file of a set."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST_FIRST))
    for name in FOUND_BY_TEXT:
        for path in {item.path for item in items if item.get_closest_marker(name)}:
            texts = [file.read_text() for file in (path, path.with_name("conftest.py")) if file.exists()]
            if not any(f"mark.{name}" in text for text in texts):
                raise pytest.UsageError(
                    f"{path}: make test-{name} finds it by the text pytest.mark.{name}, which is not there"
                )


OURS = {name: value for name, value in os.environ.items() if name.startswith("EMBFERRY_")}


@pytest.fixture(autouse=True)
def _no_settings_of_other_tests() -> None:
    """A fixture of a module or package that sets a variable would set it for the tests that run beside it, too."""
    found = {name: value for name, value in os.environ.items() if name.startswith("EMBFERRY_")}
    assert found == OURS, "a fixture with a wide scope has changed the settings in the environment"


def pytest_collection_finish() -> None:
    """Excludes what is there before the first test from every later search for garbage; some tests search often."""
    gc.collect()
    gc.freeze()
