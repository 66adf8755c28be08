"""Inputs, as small as they were found, that showed a fault. Each is run by the tests, with every check."""

from __future__ import annotations

from .raw import Pieces


def events(*codes: str) -> Pieces:
    """Returns events of a state machine from their hexadecimal form."""
    return [bytes.fromhex(code) for code in codes]


FOUND: dict[str, tuple[str, Pieces]] = {
    "an_offer_is_taken_while_no_peer_is_named": (
        "receiver_machine",
        events("92011d", "920234", "920616", "920134", "920325", "920b30", "920405"),
    ),
    "transfer_parameters_with_a_lone_surrogate_raise": ("coordinates", [b'{"embferry":{"\\ud800":0}}']),
    "an_entry_whose_metadata_is_a_list_raises": (
        "vllm_entries",
        [
            b'{"ec_transfer_params":{"":{"embferry":{"endpoint":"","room":0,"tokens":0,"width":0,"dtype":""},"metadata":[0]}}}'
        ],
    ),
    "an_encoders_answer_nested_deep_raises": ("vllm_entries", [b"[" * 6000]),
    "an_event_whose_choices_are_numbers_raises": ("vllm_answers", [b'{"choices":[0]}']),
    "an_event_whose_choices_are_one_number_raises": ("vllm_answers", [b'{"choices":1}']),
    "an_event_nested_deep_raises": ("vllm_answers", [b"[" * 6000]),
    "a_setting_that_is_no_date_raises": ("config_text", [b"host: 2001-99-99"]),
    "a_setting_with_a_wrong_tag_raises": ("config_text", [b"host: !!bool x"]),
    "settings_nested_deep_raise": ("config_text", [b"host: " + b"[" * 450 + b"]" * 450]),
}
"""By what was wrong: the target and the input."""
