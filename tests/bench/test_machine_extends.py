"""A machine is compared with what it was before packages were added."""

from __future__ import annotations

import msgspec

from embferry.bench.machine import Machine

BEFORE = Machine("a CPU", 2, 8_000_000_000, "Linux 6", "", {"sglang": "0.5.23", "nixl": ""})


def changed(**more: object) -> Machine:
    return msgspec.structs.replace(BEFORE, **more)


def test_an_added_package_makes_no_other_machine() -> None:
    assert changed(versions={"sglang": "0.5.23", "nixl": "1.5.1"}).extends(BEFORE)
    assert BEFORE.extends(BEFORE)


def test_another_version_or_another_machine_is_noticed() -> None:
    assert not changed(versions={"sglang": "0.5.24", "nixl": ""}).extends(BEFORE)
    assert not changed(versions={"nixl": ""}).extends(BEFORE)
    assert not changed(cores=4).extends(BEFORE)
