"""The states of both ends, and every transition between them.

A transition that is not in a table does not exist: the machine raises an error, because the peer's message or the
caller's call is wrong. ``scripts/draw_states.py`` draws ``docs/state-diagrams.md`` from these tables.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from .errors import LocalProtocolError


class KVPoll(IntEnum):
    """The result of ``poll()``: a projection of the state, never its source. The integers are SGLang's."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class Phase(Enum):
    """Where one end of one transfer stands."""

    BOOTSTRAPPING = "the peers have not met"
    WAITING_FOR_INPUT = "the peers have met; no token has been transferred"
    TRANSFERRING = "tokens are being transferred"
    RESUMING = "the peer was lost or replaced during the transfer; the new one is asked to continue"
    SUCCESS = "every token is verified"
    FAILED = "ended with an error"

    __hash__ = object.__hash__  # members are compared by identity; Enum's own hash is slow


class Trigger(Enum):
    """Events that move an end from one phase to another."""

    OPENED = "the receiver opened the room"
    OFFERED = "the sender made an offer"
    GRANTED = "blocks were granted"
    DELIVERED = "tokens were verified"
    COMPLETED = "the last token was verified"
    CONFIRMED = "the receiver confirmed the whole embedding"
    PEER_LOST = "the peer was lost or replaced"
    FAILED = "an error, an abort or a time-out"


TERMINAL = frozenset({Phase.SUCCESS, Phase.FAILED})

POLL: dict[Phase, KVPoll] = {
    Phase.BOOTSTRAPPING: KVPoll.Bootstrapping,
    Phase.WAITING_FOR_INPUT: KVPoll.WaitingForInput,
    Phase.TRANSFERRING: KVPoll.Transferring,
    Phase.RESUMING: KVPoll.Transferring,
    Phase.SUCCESS: KVPoll.Success,
    Phase.FAILED: KVPoll.Failed,
}

Table = dict[tuple[Phase, Trigger], Phase]

RECEIVER: Table = {
    (Phase.BOOTSTRAPPING, Trigger.OFFERED): Phase.WAITING_FOR_INPUT,
    (Phase.BOOTSTRAPPING, Trigger.DELIVERED): Phase.RESUMING,
    (Phase.BOOTSTRAPPING, Trigger.FAILED): Phase.FAILED,
    (Phase.WAITING_FOR_INPUT, Trigger.OFFERED): Phase.WAITING_FOR_INPUT,
    (Phase.WAITING_FOR_INPUT, Trigger.DELIVERED): Phase.TRANSFERRING,
    (Phase.WAITING_FOR_INPUT, Trigger.COMPLETED): Phase.SUCCESS,  # an embedding of 0 tokens
    (Phase.WAITING_FOR_INPUT, Trigger.PEER_LOST): Phase.BOOTSTRAPPING,
    (Phase.WAITING_FOR_INPUT, Trigger.FAILED): Phase.FAILED,
    (Phase.TRANSFERRING, Trigger.OFFERED): Phase.TRANSFERRING,
    (Phase.TRANSFERRING, Trigger.DELIVERED): Phase.TRANSFERRING,
    (Phase.TRANSFERRING, Trigger.COMPLETED): Phase.SUCCESS,
    (Phase.TRANSFERRING, Trigger.PEER_LOST): Phase.RESUMING,
    (Phase.TRANSFERRING, Trigger.FAILED): Phase.FAILED,
    (Phase.RESUMING, Trigger.OFFERED): Phase.TRANSFERRING,
    (Phase.RESUMING, Trigger.DELIVERED): Phase.RESUMING,
    (Phase.RESUMING, Trigger.COMPLETED): Phase.SUCCESS,
    (Phase.RESUMING, Trigger.FAILED): Phase.FAILED,
}

SENDER: Table = {
    (Phase.BOOTSTRAPPING, Trigger.OPENED): Phase.WAITING_FOR_INPUT,
    (Phase.BOOTSTRAPPING, Trigger.FAILED): Phase.FAILED,
    (Phase.WAITING_FOR_INPUT, Trigger.OPENED): Phase.WAITING_FOR_INPUT,
    (Phase.WAITING_FOR_INPUT, Trigger.GRANTED): Phase.TRANSFERRING,
    (Phase.WAITING_FOR_INPUT, Trigger.CONFIRMED): Phase.SUCCESS,
    (Phase.WAITING_FOR_INPUT, Trigger.PEER_LOST): Phase.BOOTSTRAPPING,
    (Phase.WAITING_FOR_INPUT, Trigger.FAILED): Phase.FAILED,
    (Phase.TRANSFERRING, Trigger.OPENED): Phase.TRANSFERRING,
    (Phase.TRANSFERRING, Trigger.GRANTED): Phase.TRANSFERRING,
    (Phase.TRANSFERRING, Trigger.CONFIRMED): Phase.SUCCESS,
    (Phase.TRANSFERRING, Trigger.PEER_LOST): Phase.RESUMING,
    (Phase.TRANSFERRING, Trigger.FAILED): Phase.FAILED,
    (Phase.RESUMING, Trigger.OPENED): Phase.TRANSFERRING,
    (Phase.RESUMING, Trigger.FAILED): Phase.FAILED,
}


def step(table: Table, phase: Phase, trigger: Trigger) -> Phase:
    """Returns the phase after ``trigger``.

    Raises:
        LocalProtocolError: The table has no such transition.
    """
    try:
        return table[phase, trigger]
    except KeyError:
        raise LocalProtocolError(f"nothing can be {trigger.name} while {phase.name}") from None
