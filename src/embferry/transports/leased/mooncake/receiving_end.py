"""The receiving side of Mooncake: one engine for all senders, which writes through an alias of the region.

Replacing the alias cuts every writer off at once (:mod:`.alias`), in doubt or not, also one whose process is stopped or
whose network is gone. So a revocation waits no longer than its grace period, and closing the blocks under a writer that
is not done is immediate. Writes of others that were under way fail visibly: their senders repeat them, through the new
alias. To need this as seldom as possible, a sender reports a write only after its "done" has been acknowledged.
"""

from __future__ import annotations

import os
import socket

from ...contract import Region
from ...net.loop import Scope
from ...outbox import Outbox
from ..leases import LeaseTable
from ..receiving_end import ReceivingEnd, SenderConnection
from .alias import Alias
from .engine import Engine


class MooncakeReceivingEnd(ReceivingEnd):
    """Everything that receives into one region.

    Args:
        fd: The region's memfd.
        engine: Closed by :meth:`close`.
        grace_s: How long a revocation waits for the holders of leases before it cuts them off.

    Attributes:
        severed: The aliases that have been replaced.
    """

    acknowledges = True
    max_senders = 1024

    def __init__(
        self,
        region: Region,
        fd: int,
        engine: Engine,
        token: bytes,
        sock: socket.socket,
        grace_s: float,
        loop: Scope,
        outbox: Outbox,
    ) -> None:
        self.engine, self._size = engine, region.view.nbytes
        self._fd = os.dup(fd)
        try:
            self._alias = Alias(self._fd, self._size, populate=True)
            engine.register(self._alias.address, self._size)
        except BaseException:
            os.close(self._fd)
            raise
        self.severed: list[Alias] = []
        table = LeaseTable(region, self._alias.address, self._replace_alias)
        super().__init__(table, token, sock, loop, outbox, grace_s=grace_s)
        self.listener.start()

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
        self.engine.unregister(self._alias.address)
        self._alias.sever()
        self.severed.append(self._alias)
        self._alias = Alias(self._fd, self._size, populate=False)
        self.engine.register(self._alias.address, self._size)
        return self._alias.address
