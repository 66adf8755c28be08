"""The numbers that a transfer goes by. All times are seconds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import LocalProtocolError


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Time-outs, retries and sizes of one end. Every state has a time-out; none of them is infinite."""

    bootstrap_timeout: float = 30.0
    """Without the peer's first word."""
    waiting_timeout: float = 120.0
    """Between the offer and the first token: the encoder's time."""
    transfer_timeout: float = 30.0
    """While transferring, without a newly verified token although blocks are granted."""
    peer_timeout: float = 10.0
    """Without any word from the peer although something was asked of it."""
    lease_timeout: float = 60.0
    """How long a sender keeps an embedding for a receiver that does not speak."""
    drain_timeout: float = 2.0
    """How long to wait for a writer's acknowledgement before its access is revoked."""
    retry_interval: float = 0.1
    """Before the first repetition of a message that was not answered; doubled each time."""
    retry_limit: float = 1.0
    """The longest interval between repetitions; also the heartbeat's."""
    linger: float = 5.0
    """How long an end that has finished answers a peer that has not."""
    default_allocate_tokens: int = 8192
    """Granted when the length is not known yet."""
    progress_rate: float = 50.0
    """Acknowledgements a second, at most: the sender needs none to go on."""
    chunk_bytes: int = 16 << 20
    """A chunk is written, verified and, if need be, asked for again as one."""
    writes_in_flight: int = 4
    """Chunks of one transfer being written at once."""
    max_bad_chunks: int = 16
    """Chunks in a row that may fail their checksum or their write before the transfer is given up."""
    max_peer_losses: int = 16
    """How often in a row the peer may be lost, without a token in between, before the transfer is given up."""

    transport_failures: int = 2
    """How often in a row a transport may fail before the sender takes the next one that both know."""
    verify: bool = True
    """Whether every chunk comes with a checksum and is compared with it. The receiving end's decides for both."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not value > 0:
                raise LocalProtocolError(f"{field.name} must be greater than 0, not {value}")


DEFAULTS = TransferSettings()
