"""The settings of the plug-in: the variables ``EMBFERRY_SGLANG_*`` of the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from embferry import LocalProtocolError, TransferSettings, Transport, Trust
from embferry.memory.limits import default_max_embedding_bytes

from ..shared.transports import check_names, make_transports

SWITCH = "EMBFERRY_SGLANG"
"""The variable that switches the plug-in on. ``SGLANG_PLUGINS`` with the plug-in's name does the same."""
PREFIX = f"{SWITCH}_"
NAME = "embferry"
"""The name of the plug-in, as ``SGLANG_PLUGINS`` has it."""
SWITCHES = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False, "": False}
MAX_BAD_CHUNKS = 4
"""Damaged chunks in a row before an encoder counts as lost: about one second with the pauses in between."""

Count = Annotated[int, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=365 * 86_400)]
Address = Annotated[str, msgspec.Meta(min_length=1)]
VideoRate = Literal["sampled", "undivided"]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class PluginSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every variable, without the prefix and in lower case. Times are seconds, sizes are bytes unless stated otherwise.

    Attributes:
        transports: Names of the transports, the preferred one first, with commas.
        host: The address to listen on.
        advertise: The address that the other side is told, if it differs from ``host``.
        num_blocks: Language server: blocks in the pool. An embedding may be larger than the pool.
        block_size: Language server: tokens per block.
        max_embedding_bytes: Language server: the largest embedding that is accepted.
        encoder_timeout: Time without a sign of life after which an encoder counts as lost.
        encode_timeout: Longest time from the request of an encode to its first token.
        failover_timeout: How long a transfer waits for another encoder when its own is lost.
        lease_timeout: Encoder: how long it keeps an embedding for a language server that sends no message.
        video_rate: Encoder: the frame rate for the time positions of videos of Qwen2.5-VL: ``sampled``, as SGLang's
            encoder has it, or ``undivided``, the same mistaken one as in SGLang's undivided server.
        metrics_port: Port of the Prometheus endpoint at ``host``, 0 for any. Rank r of a language server adds r.
    """

    transports: tuple[str, ...] = ("shm", "tcp")
    host: Address = "127.0.0.1"
    advertise: Address | None = None
    num_blocks: Count = 1024
    block_size: Count = 16
    max_embedding_bytes: Count = msgspec.field(default_factory=default_max_embedding_bytes)
    encoder_timeout: Seconds = 1.0
    encode_timeout: Seconds = 180.0
    failover_timeout: Seconds = 10.0
    lease_timeout: Seconds = 60.0
    video_rate: VideoRate = "sampled"
    metrics_port: Port | None = None

    @property
    def trust(self) -> Trust:
        """The cluster key, as ``EMBFERRY_CLUSTER_KEY_FILE`` and its like say.

        Raises:
            LocalProtocolError: The key file cannot be used.
        """
        return Trust.of_environment()

    @property
    def sending(self) -> TransferSettings:
        """Settings of an encoder. It waits for a language server that may be busy with other requests first."""
        return TransferSettings(
            bootstrap_timeout=self.encode_timeout, lease_timeout=self.lease_timeout, peer_timeout=self.encoder_timeout
        )

    @property
    def receiving(self) -> TransferSettings:
        """Settings of a language server.

        An encoder that is busy answers, because threads of the library do so, and may take ``encode_timeout``. One that
        does not answer is lost.
        """
        return TransferSettings(
            bootstrap_timeout=self.encode_timeout,
            waiting_timeout=self.encode_timeout,
            transfer_timeout=10 * self.encoder_timeout,
            answer_timeout=self.encoder_timeout,
            peer_timeout=self.encoder_timeout,
            drain_timeout=self.encoder_timeout / 2,
            max_peer_losses=1,
            max_bad_chunks=MAX_BAD_CHUNKS,
            max_embedding_bytes=self.max_embedding_bytes,
        )

    def make_transports(self) -> list[Transport]:
        """Returns new transports, one for each name.

        Raises:
            TransportError: The engine of a transport is not installed, or its address is not available.
        """
        return make_transports(self.transports, self.host, self.advertise, self.trust)


def is_switched_on(environment: Mapping[str, str]) -> bool:
    """Returns whether the environment asks for the plug-in.

    Raises:
        LocalProtocolError: The switch has neither of its two values.
    """
    value = environment.get(SWITCH)
    if value is None:
        return NAME in (name.strip() for name in environment.get("SGLANG_PLUGINS", "").split(","))
    if value.lower() not in SWITCHES:
        raise LocalProtocolError(f"{SWITCH} is 1 or 0, not {value!r}")
    return SWITCHES[value.lower()]


def read(environment: Mapping[str, str]) -> PluginSettings:
    """Returns the settings.

    Raises:
        LocalProtocolError: A variable is unknown, or its value is not allowed, or strangers can reach ``host`` and
            there is no cluster key.
    """
    given: dict[str, Any] = {
        name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)
    }
    if "transports" in given:
        given["transports"] = [name.strip() for name in given["transports"].split(",") if name.strip()]
    known = [field.name for field in msgspec.structs.fields(PluginSettings)]
    for name in sorted(set(given) - set(known)):
        there_are = ", ".join(PREFIX + each.upper() for each in known)
        raise LocalProtocolError(f"{PREFIX}{name.upper()} is no variable of the plug-in; there are {there_are}")
    try:
        settings = msgspec.convert(given, PluginSettings, strict=False)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        name = place.strip("`").removeprefix("$.")
        raise LocalProtocolError(f"{PREFIX}{name.upper()}={given[name]!r} is wrong: {why}") from None
    check_names(settings.transports, f"{PREFIX}TRANSPORTS")
    settings.trust.check_listening(settings.host, "the plug-in")  # now, and not with the first request
    return settings
