"""Time-outs, retries and sizes of a transfer. All times are seconds."""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from .errors import LocalProtocolError, shown


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Settings of one end. Every state that waits for the peer has a finite time-out.

    Raises:
        LocalProtocolError: A number is not greater than 0, or not an integer where it counts something.
    """

    bootstrap_timeout: float = 30.0
    """Longest wait for the offer of an encode worker that answers, or for the first language worker."""
    answer_timeout: float = 5.0
    """Longest silence of an encode worker that has made no offer yet. One that answers has ``bootstrap_timeout``."""
    waiting_timeout: float = 120.0
    """Longest time between the offer and the first token: the encoder runs meanwhile."""
    transfer_timeout: float = 30.0
    """Longest time without a newly verified token, or without bytes that come in, while blocks are granted."""
    peer_timeout: float = 5.0
    """Longest silence of the peer while an answer is outstanding."""
    lease_timeout: float = 60.0
    """How long a sender keeps an embedding for a silent receiver."""
    drain_timeout: float = 2.0
    """Longest wait for a writer to acknowledge a drain before its access is revoked."""
    retry_interval: float = 0.1
    """Time before an unanswered message is first repeated; doubles with each repetition."""
    retry_limit: float = 1.0
    """The longest interval between repetitions; also the heartbeat's. A third of the shortest time-out for silence if
    that is less: else a peer that has nothing else to say would seem to be gone."""
    linger: float = 5.0
    """How long an end that has finished still answers its peer."""
    default_allocate_tokens: int = 8192
    """Tokens granted while the length is not known."""
    progress_rate: float = 50.0
    """Most acknowledgements a second. The sender does not wait for them."""
    max_embedding_bytes: int = 16 << 30
    """Largest embedding that a receiver accepts, in bytes. It refuses a longer one before it asks for any memory."""
    chunk_bytes: int = 16 << 20
    """Size of a chunk, which is written, verified and, if need be, requested again as one."""
    writes_in_flight: int = 4
    """Most chunks of one transfer that are written at once."""
    max_bad_chunks: int = 16
    """Chunks in a row that may fail their checksum or their write before the transfer fails."""
    max_peer_losses: int = 16
    """How often in a row the peer may be lost, without a verified token in between, before the transfer fails."""
    transport_failures: int = 2
    """How often in a row a transport may fail before the sender takes the next shared one."""
    parked_requests: int = 1024
    """Most ``open`` messages kept at an encode worker for rooms that are not open there yet."""
    parked_bytes: int = 16 << 20
    """Most bytes of such messages."""
    verify: bool = True
    """Whether every chunk has a checksum that is compared on arrival. The receiver's setting decides for both."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            kind: Any = type(field.default)
            if kind is bool and isinstance(value, bool):
                continue
            numeric = hasattr(value, "__index__" if kind is int else "__float__")
            number: int | float | None = None
            if numeric and kind is not bool and not isinstance(value, bool | str):
                with suppress(TypeError, ValueError, OverflowError):  # an array, or more than a float can be
                    number = operator.index(value) if kind is int else float(value)
            if number is None:
                raise LocalProtocolError(f"{field.name} must be of type {kind.__name__}, not {shown(value, 80)}")
            if not number > 0:
                raise LocalProtocolError(f"{field.name} must be greater than 0, not {value}")
            object.__setattr__(self, field.name, number)

    @property
    def longest_interval(self) -> float:
        """The longest interval between repetitions, in seconds: a peer has three chances to answer."""
        return min(self.retry_limit, self.answer_timeout / 3, self.peer_timeout / 3)


DEFAULTS = TransferSettings()
