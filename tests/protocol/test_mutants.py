"""Every guard is needed: without it, an invariant breaks.

A mutant is the program with one guard that always returns True, or with two commands in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import pytest
from hypothesis import Phase

from embferry.protocol import guards
from embferry.protocol.commands import Admit, CloseBlocks, ReceiverCommand, Send, Verify
from embferry.protocol.messages import Grant, Written
from embferry.protocol.receiver import Receiver
from embferry.testing.network import InFlightWrite

from .ends import InvariantError, LanguageEnd
from .quiescence import quiesce
from .scenarios import SCENARIOS
from .script import Script
from .test_property import search

CASES = [(name, scenario) for name, scenarios in SCENARIOS.items() for scenario in scenarios]
FOUND_BY_SEARCH = ("is_new", "is_ready", "may_report_drained", "may_release_source", "may_count", "may_release")
"""Guards whose mutant the random search finds within seconds. The others need a scenario."""
SLOW = ("may_count", "may_report_drained", "may_release_source")


def test_every_guard_has_a_mutant() -> None:
    assert set(SCENARIOS) == {guard.__name__ for guard in guards.GUARDS}
    written = {name for name, found in vars(guards).items() if isinstance(found, FunctionType)}
    assert written == set(SCENARIOS)


@pytest.mark.parametrize(("guard", "scenario"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_scenario_breaks_an_invariant_only_without_its_guard(
    guard: str, scenario: Callable[[], Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiesce(scenario())
    monkeypatch.setattr(guards, guard, lambda *_: True)
    with pytest.raises(InvariantError):
        scenario()


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "guard", [pytest.param(name, marks=pytest.mark.sweeps) if name in SLOW else name for name in FOUND_BY_SEARCH]
)
def test_the_random_search_finds_a_missing_guard(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, guard, lambda *_: True)
    with pytest.raises(InvariantError):
        search(max_examples=3000, stateful_step_count=40, derandomize=True, phases=[Phase.generate])


# Order of commands


def swapped(first: type, second: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the receiver issue a ``first`` directly before a ``second`` in the opposite order."""
    take = Receiver.take_commands

    def take_swapped(self: Receiver) -> list[ReceiverCommand]:
        commands = take(self)
        for at in range(len(commands) - 1):
            if isinstance(commands[at], first) and isinstance(commands[at + 1], second):
                commands[at], commands[at + 1] = commands[at + 1], commands[at]
        return commands

    monkeypatch.setattr(Receiver, "take_commands", take_swapped)


def writer_overwrites_a_reported_chunk() -> Script:
    """A writer reports a chunk and writes to it again, between the two commands that the report causes."""
    s = Script(total=4, num_blocks=2, checks_windows=True, eager=True)
    s.handshake()
    s.arrives(Grant)
    before: list[ReceiverCommand] = []

    def overwrite(end: LanguageEnd, command: ReceiverCommand) -> None:
        previous = before[-1] if before else None
        before.append(command)
        if {type(previous), type(command)} == {CloseBlocks, Verify}:
            assert isinstance(command, CloseBlocks | Verify)
            second = InFlightWrite(None, command.epoch, command.blocks[:1], range(1), lambda token: b"\xff" * 8, b"")
            s.memory.start(second)
            s.memory.finish(second)

    s.before_command = overwrite
    s.complete(s.memory.in_flight[0])
    s.arrives(Written)
    assert before
    return s


def test_blocks_are_closed_before_they_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    quiesce(writer_overwrites_a_reported_chunk())
    swapped(CloseBlocks, Verify, monkeypatch)
    with pytest.raises(InvariantError, match="bytes"):
        writer_overwrites_a_reported_chunk()


def write_completes_at_once() -> Script:
    """A granted write completes before the receiver executes its next command."""
    s = Script(total=4, num_blocks=2, checks_windows=True)

    def complete(end: LanguageEnd, command: ReceiverCommand) -> None:
        if isinstance(command, Admit) and s.where(Grant):
            s.arrives(Grant)
            s.complete_writes()

    s.before_command = complete
    s.handshake()
    return s


def test_blocks_are_admitted_before_they_are_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    quiesce(write_completes_at_once())
    swapped(Admit, Send, monkeypatch)
    with pytest.raises(InvariantError, match="refused"):
        write_completes_at_once()
