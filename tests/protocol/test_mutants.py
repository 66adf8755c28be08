"""Every rule is needed: without it, an invariant breaks.

A mutant is the program with one guard that always agrees, or with two commands the other way round.
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
from embferry.testing.network import Flight

from .ends import InvariantError, LanguageEnd
from .quiescence import quiesce
from .scenarios import SCENARIOS
from .script import Script
from .test_property import search

CASES = [(name, scenario) for name, scenarios in SCENARIOS.items() for scenario in scenarios]
SOON_FOUND = ("is_new", "is_ready", "may_report_drained", "may_release_source", "may_count", "may_release")
"""Guards that chance finds missing within seconds; the others need their script."""


def test_every_guard_has_a_mutant() -> None:
    assert set(SCENARIOS) == {guard.__name__ for guard in guards.GUARDS}
    written = {name for name, found in vars(guards).items() if isinstance(found, FunctionType)}
    assert written == set(SCENARIOS)


@pytest.mark.parametrize(("guard", "scenario"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_script_is_harmless_with_the_guard_and_fatal_without(
    guard: str, scenario: Callable[[], Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiesce(scenario())
    monkeypatch.setattr(guards, guard, lambda *_: True)
    with pytest.raises(InvariantError):
        scenario()


@pytest.mark.parametrize("guard", SOON_FOUND)
def test_chance_finds_the_mutant(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, guard, lambda *_: True)
    with pytest.raises(InvariantError):
        search(max_examples=3000, stateful_step_count=40, derandomize=True, phases=[Phase.generate])


# Order of commands


def swapped(first: type, second: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``first`` that is directly followed by a ``second`` comes after it instead."""
    take = Receiver.take_commands

    def take_swapped(self: Receiver) -> list[ReceiverCommand]:
        commands = take(self)
        for at in range(len(commands) - 1):
            if isinstance(commands[at], first) and isinstance(commands[at + 1], second):
                commands[at], commands[at + 1] = commands[at + 1], commands[at]
        return commands

    monkeypatch.setattr(Receiver, "take_commands", take_swapped)


def writer_lies() -> Script:
    """A writer reports a chunk and writes to it again, between the two commands that follow from the report."""
    s = Script(total=4, num_blocks=2, gated=True, eager=True)
    s.meet()
    s.arrives(Grant)
    before: list[ReceiverCommand] = []

    def strike(end: LanguageEnd, command: ReceiverCommand) -> None:
        previous = before[-1] if before else None
        before.append(command)
        if {type(previous), type(command)} == {CloseBlocks, Verify}:
            assert isinstance(command, CloseBlocks | Verify)
            lie = Flight(None, command.epoch, command.blocks[:1], range(1), lambda token: b"\xff" * 8, b"")
            s.memory.write(lie)
            s.memory.finish(lie)

    s.before_command = strike
    s.complete(s.memory.flights[0])
    s.arrives(Written)
    assert before
    return s


def test_blocks_are_closed_before_they_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    quiesce(writer_lies())
    swapped(CloseBlocks, Verify, monkeypatch)
    with pytest.raises(InvariantError, match="not what was sent"):
        writer_lies()


def sender_is_fast() -> Script:
    """A granted write completes before the receiver executes its next command."""
    s = Script(total=4, num_blocks=2, gated=True)

    def hurry(end: LanguageEnd, command: ReceiverCommand) -> None:
        if isinstance(command, Admit) and s.where(Grant):
            s.arrives(Grant)
            s.all_land()

    s.before_command = hurry
    s.meet()
    return s


def test_blocks_are_admitted_before_they_are_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    quiesce(sender_is_fast())
    swapped(Admit, Send, monkeypatch)
    with pytest.raises(InvariantError, match="a write that was granted is refused"):
        sender_is_fast()
