"""The tables of states, errors and settings, which must not change by accident."""

from __future__ import annotations

import dataclasses

import pytest

from embferry.protocol import errors
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, from_code
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import POLL, RECEIVER, SENDER, TERMINAL, KVPoll, Phase, Table, Trigger, step

TABLES = pytest.mark.parametrize("table", [RECEIVER, SENDER], ids=["receiver", "sender"])


@TABLES
def test_every_unfinished_phase_can_fail_and_no_final_phase_changes(table: Table) -> None:
    for phase in Phase:
        if phase in TERMINAL:
            assert not [trigger for trigger in Trigger if (phase, trigger) in table]
        else:
            assert table[phase, Trigger.FAILED] is Phase.FAILED


@TABLES
def test_every_phase_can_be_reached_and_can_lead_to_success(table: Table) -> None:
    reached, before = {Phase.BOOTSTRAPPING}, set()
    while reached != before:
        before = set(reached)
        reached |= {after for (phase, _), after in table.items() if phase in reached}
    assert reached == set(Phase)
    leads = {Phase.SUCCESS}
    for _ in Phase:
        leads |= {phase for (phase, _), after in table.items() if after in leads}
    assert leads == set(Phase) - {Phase.FAILED}


@TABLES
def test_only_transitions_of_the_table_exist(table: Table) -> None:
    for phase in Phase:
        for trigger in Trigger:
            if (phase, trigger) in table:
                assert step(table, phase, trigger) is table[phase, trigger]
            else:
                with pytest.raises(LocalProtocolError, match=trigger.name):
                    step(table, phase, trigger)


def test_the_integers_of_the_poll_states_do_not_change() -> None:
    assert {status.name: status.value for status in KVPoll} == {
        "Failed": 0,
        "Bootstrapping": 1,
        "WaitingForInput": 2,
        "Transferring": 3,
        "Success": 4,
    }
    assert POLL.keys() == set(Phase)


def test_error_codes_statuses_and_retryability_do_not_change() -> None:
    assert {code: (cls.__name__, cls.http_status, cls.default_retryable) for code, cls in errors.BY_CODE.items()} == {
        "transfer_failed": ("EmbeddingTransferError", 502, False),
        "local_protocol_error": ("LocalProtocolError", 500, False),
        "remote_protocol_error": ("RemoteProtocolError", 502, False),
        "version_mismatch": ("VersionMismatch", 502, False),
        "layout_mismatch": ("LayoutMismatch", 502, False),
        "transport_error": ("TransportError", 502, True),
        "transport_stalled": ("TransportStalled", 502, True),
        "wrong_key": ("WrongKey", 502, False),
        "tls_failed": ("TlsFailed", 502, False),
        "capacity_exhausted": ("CapacityError", 503, True),
        "integrity_error": ("IntegrityError", 502, False),
        "lease_expired": ("LeaseExpired", 504, True),
        "peer_gone": ("PeerGone", 503, True),
        "aborted": ("Aborted", 499, False),
    }


def test_every_error_class_has_its_own_code() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, EmbeddingTransferError)]
    assert set(errors.BY_CODE.values()) == set(classes)
    assert all(cls.code == code for code, cls in errors.BY_CODE.items())


def test_the_text_of_an_error_has_its_code_and_room() -> None:
    assert str(errors.PeerGone("start the worker again", room=7)) == "[peer_gone] room 7: start the worker again"
    assert str(errors.Aborted("asked for")) == "[aborted] asked for"
    assert errors.Aborted("asked for", retryable=True).retryable


def test_an_unknown_code_is_kept_in_the_text() -> None:
    error = from_code("of_the_future", "upgrade", room=7)
    assert type(error) is EmbeddingTransferError
    assert str(error) == "[transfer_failed] room 7: upgrade (the peer's code: of_the_future)"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TransferSettings)])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_settings_are_positive(name: str, value: float) -> None:
    with pytest.raises(LocalProtocolError, match=name):
        TransferSettings(**{name: value})
