"""The trust of a part in its peers: one object for everything that listens or dials."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from embferry.protocol.errors import LocalProtocolError

from .greeting import NONCE_BYTES, Channel, Greeting, Role
from .keys import ClusterKeys
from .policy import check_listening

KEY_ENV = "EMBFERRY_CLUSTER_KEY"
KEY_FILE_ENV = "EMBFERRY_CLUSTER_KEY_FILE"
INSECURE_ENV = "EMBFERRY_INSECURE"
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Trust:
    """The keys that peers must know, and where a part may listen without any.

    Attributes:
        keys: Peers must know one of them. None: there are none, and peers that have some are refused.
        insecure: Whether the part may listen where strangers can reach it although it has no keys.
    """

    keys: ClusterKeys | None = None
    insecure: bool = False

    @classmethod
    def of_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        key_file: str | os.PathLike[str] | None = None,
        insecure: bool = False,
    ) -> Trust:
        """Returns what the environment says; an empty variable counts as not set.

        Args:
            key_file: A key file to use in place of the one that the environment names.
            insecure: Whether strangers may be let in, even if the environment does not say so.
            environ: ``EMBFERRY_CLUSTER_KEY`` (one key, or two separated by a comma) or ``EMBFERRY_CLUSTER_KEY_FILE``,
                and ``EMBFERRY_INSECURE``. None: the environment of this process.

        Raises:
            LocalProtocolError: A value is wrong, or both of the keys are given.
        """
        environ = os.environ if environ is None else environ
        text, path = environ.get(KEY_ENV, ""), str(key_file or environ.get(KEY_FILE_ENV, ""))
        if text and path:
            raise LocalProtocolError(f"{KEY_ENV} and {KEY_FILE_ENV} are both set; keep one of them")
        keys = ClusterKeys.of_text(text, KEY_ENV) if text else ClusterKeys.of_file(path) if path else None
        said = environ.get(INSECURE_ENV, "").strip().lower()
        if said not in _YES + _NO:
            raise LocalProtocolError(f"{INSECURE_ENV} is 1 or 0, not {said[:20]!r}")
        return cls(keys, insecure or said in _YES)

    @classmethod
    def or_environment(cls, trust: Trust | None) -> Trust:
        """Returns ``trust``, or what the environment says if it is None. What constructors do with their argument."""
        return cls.of_environment() if trust is None else trust

    def check_listening(self, host: str, what: str) -> None:
        """Checks that ``what`` may listen on ``host``: on a loopback address, or with keys, or ``insecure``.

        Args:
            host: The address.
            what: What listens, for the text: "the control port".

        Raises:
            LocalProtocolError: Strangers could reach it, and nothing keeps them out. The text says what to do.
        """
        check_listening(host, what, has_key=self.keys is not None, insecure=self.insecure)

    def greeting(self, role: Role, channel: Channel) -> Greeting:
        """Returns the greeting of a new connection, with the keys that are valid now. Any thread."""
        keys = () if self.keys is None else self.keys.accepted()
        return Greeting(role, channel, keys, secrets.token_bytes(NONCE_BYTES))
