"""The receiving side of Mooncake: one engine for all senders, which writes through an alias of the region.

Replacing the alias cuts every writer off at once (:mod:`.alias`), in doubt or not, also one whose process is stopped or
whose network is gone. So a revocation waits no longer than its grace period, and closing the blocks under a writer that
is not done is immediate. Writes of others that were under way fail visibly: their senders repeat them, through the new
alias. To need this as seldom as possible, a sender reports a write only after its "done" has been acknowledged.
"""

from __future__ import annotations

import contextlib
import os

from embferry.protocol.errors import LocalProtocolError, TransportError

from ...contract import Region
from ...net.loop import Scope
from ...outbox import Outbox
from ..receiving_end import ReceivingEnd, SenderConnection
from .alias import Alias
from .engine import Engine, EngineSettings


class MooncakeReceivingEnd(ReceivingEnd):
    """Everything that receives into one region.

    Args:
        grace_s: How long a revocation waits for the holders of leases before it cuts them off.

    Attributes:
        severed: The aliases that have been replaced.
    """

    max_senders = 1024

    def __init__(self, region: Region, settings: EngineSettings, grace_s: float, loop: Scope, outbox: Outbox) -> None:
        if region.fd is None:
            text = "the mooncake transport needs memory it can map twice: MultimodalDataBuffers(..., shared=True)"
            raise LocalProtocolError(text)
        self.severed: list[Alias] = []
        self._size = region.view.nbytes
        with contextlib.ExitStack() as undo:
            self.engine = Engine(settings)
            undo.callback(self.engine.close)
            try:
                self._fd = os.dup(region.fd)
                undo.callback(os.close, self._fd)
                self._alias = self._map(populate=True)
            except OSError as error:
                raise TransportError(f"cannot map the region again: {error}") from error
            undo.pop_all()
        super().__init__(region, self._alias.address, loop, outbox, self._replace_alias, grace_s)

    def attach(self, sender: SenderConnection) -> None:
        sender.welcome(b"")

    def detach(self, sender: SenderConnection) -> None:
        sender.close()

    def close(self) -> None:
        self._carry_out_soon(self.table.close_all())
        self._alias.sever()
        self.engine.close()
        self._carry_out_soon(self.table.end_all())
        for alias in (*self.severed, self._alias):
            alias.release()
        os.close(self._fd)
        self.loop.call(self._stop)

    def _replace_alias(self) -> int:
        """Cuts every writer off and returns the address of the new alias. The lease table calls it with its lock held.

        In this order: no new write through the old alias, then no byte, then the new one.
        """
        try:
            self.engine.unregister(self._alias.address)
            self._alias.sever()
            self.severed.append(self._alias)
            self._alias = self._map(populate=False)
        except Exception as error:
            self.outbox.fail(error)  # no engine can write any more, and no revocation can end
            raise
        return self._alias.address

    def _map(self, *, populate: bool) -> Alias:
        alias = Alias(self._fd, self._size, populate=populate)
        self.engine.register(alias.address, self._size)
        return alias
