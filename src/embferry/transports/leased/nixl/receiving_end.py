"""The receiving side of NIXL: an agent for each sender.

Destroying an agent is the only way to be sure that nothing more comes from a sender that died or failed: with the agent
go the sockets, queues and keys through which a late byte could come. Each sender has an agent of its own so that the
others do not notice. Agents are made and destroyed on two threads of their own, for either takes the engine a while.

A sender on the same host can also write without the help of our agent, through shared memory. But its connection ends
only by its own hand, after its writes have ended, or with its process, and the kernel closes a process's sockets when
the last of its threads has ceased to run. So such a sender holds a revocation up while it is stopped. (A child that was
forked off keeps the connection open, and holds the lease up; it cannot end it too early.)
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from embferry.protocol.errors import TransportError

from ...contract import Region
from ...net.loop import Scope
from ...outbox import Outbox
from ..engine_thread import without_traceback
from ..jobs import address_of
from ..receiving_end import ReceivingEnd, SenderConnection
from .agent import Agent, Backends

log = logging.getLogger(__name__)

AGENT_THREADS = 2

MadeAgent = tuple[Agent, bytes] | TransportError
"""An agent and its metadata, or the reason why there is none."""


class NixlReceivingEnd(ReceivingEnd):
    """Everything that receives into one region.

    Args:
        close_timeout_s: How long :meth:`close` waits for the holders of leases.
    """

    max_senders = 256  # each has an agent: a thread, and descriptors
    descriptors_of_a_sender = 20

    def __init__(self, region: Region, backends: Backends, close_timeout_s: float, loop: Scope, outbox: Outbox) -> None:
        self._address, self._size = address_of(region.view), region.view.nbytes
        self._backends, self._close_timeout_s = backends, close_timeout_s
        self._first: Agent | None = self._make_agent()  # now, so that a wrong setting is an error of register()
        super().__init__(region, self._address, loop, outbox)
        self._executor = ThreadPoolExecutor(AGENT_THREADS, thread_name_prefix="embferry-nixl-agents")
        self.agents: dict[SenderConnection, Future[MadeAgent]] = {}

    def attach(self, sender: SenderConnection) -> None:
        first, self._first = self._first, None
        self.agents[sender] = made = self._executor.submit(self._with_metadata, first)
        made.add_done_callback(lambda _: sender.scope.call(partial(self._welcome, sender)))

    def detach(self, sender: SenderConnection) -> None:
        made = self.agents.pop(sender, None)
        if made is None:
            sender.close()
        else:
            self._executor.submit(_destroy, made).add_done_callback(partial(self._destroyed, sender))

    def close(self) -> None:
        """Ends all access to the region, as far as it can be ended.

        Raises:
            TransportError: A stopped process on this host may still write.
        """
        self._carry_out_soon(self.table.close_all())
        late = self.table.out(self._close_timeout_s)
        stopped = threading.Event()
        self.loop.call(self._stop)
        self.loop.call(stopped.set)
        stopped.wait(self._close_timeout_s)
        self._executor.shutdown(wait=True)
        if self._first is not None:
            self._first.close()
            self._first = None
        if any(isinstance(lease.holder, SenderConnection) and lease.holder.same_host for lease in late):
            text = f"a stopped writer has not left the region within {self._close_timeout_s} s; give the region up"
            raise TransportError(text, retryable=False)

    # On the loop's thread

    def _welcome(self, sender: SenderConnection) -> None:
        if sender.ending:
            return
        made = self.agents[sender].result()
        if isinstance(made, TransportError):
            log.error("no agent for a sender: %s", made)
            sender.tear_down("there is no agent for it", logging.DEBUG)
        else:
            sender.welcome(made[1])

    def _end(self, sender: SenderConnection) -> None:
        self.carry_out(self.table.ended(sender))
        sender.close()  # only now: the sender takes it as the word that nothing lands any more

    # On a thread of the executor

    def _make_agent(self) -> Agent:
        agent = Agent(self._backends)
        agent.register(self._address, self._size)
        return agent

    def _with_metadata(self, agent: Agent | None) -> MadeAgent:
        try:
            agent = agent or self._make_agent()
            return agent, agent.metadata()
        except TransportError as error:
            return without_traceback(error)

    def _destroyed(self, sender: SenderConnection, outcome: Future[None]) -> None:
        """Ends the leases of a sender whose agent is destroyed. If that failed, nothing may be reported as over."""
        if error := outcome.exception():
            self.outbox.fail(error)
        else:
            self.loop.call(partial(self._end, sender))


def _destroy(agent: Future[MadeAgent]) -> None:
    made = agent.result()
    if not isinstance(made, TransportError):
        made[0].close()
