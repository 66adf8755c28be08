"""The receiving side: one listener, and for each sender a connection and an agent of its own.

An agent for each, because destroying it is the only way to be sure that nothing more comes from a sender that died or
failed (see :mod:`gate`), and the others shall not notice. Agents are made and destroyed on two threads of their own,
for either takes the engine a while.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from embferry.protocol.errors import TransportError

from ...contract import Region, Revoked, Window
from ...net.connector import set_keepalive
from ...net.listener import Listener
from ...net.loop import Loop
from ...outbox import Outbox
from .agent import Agent, Backends, fresh
from .channel import Channel
from .gate import Gate, Lease, Outcome
from .job import address_of
from .messages import (
    MAX_FRAME,
    MAX_HELLO_FRAME,
    Ask,
    Broken,
    Done,
    FrameError,
    Hello,
    Message,
    Stop,
    Verdict,
    Welcome,
    unpack_ranges,
)

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
MAX_CONNECTIONS = 256  # each has an agent: a thread and about twenty descriptors
AGENT_THREADS = 2


class Server:
    """Everything that receives into one region.

    :raises TransportError: the engine cannot be set up, or does not take the region.
    """

    def __init__(
        self, region: Region, token: bytes, boot_id: str, sock: socket.socket, backends: Backends, loop: Loop,
        outbox: Outbox,
    ) -> None:  # fmt: skip
        self.gate = Gate(region)
        self.token, self.boot_id, self.loop, self.outbox = token, boot_id, loop, outbox
        self.base, self._size = address_of(region.view), region.view.nbytes
        self._backends = backends
        self._first: Agent | None = self._make_agent()  # now, so that a wrong setting is an error of register()
        self.agents = ThreadPoolExecutor(AGENT_THREADS, thread_name_prefix="embferry-nixl-agents")
        self.listener = Listener(sock, loop, "a sender", MAX_CONNECTIONS, partial(Incoming, self))
        self._changed = threading.Event()
        self.listener.start()

    def admit(self, window: Window) -> None:
        self.gate.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._carry_out_soon(self.gate.close_blocks(epoch, blocks))

    def revoke(self, epoch: int) -> None:
        self._carry_out_soon(self.gate.revoke(epoch))

    def agent(self) -> tuple[Agent, bytes] | TransportError:
        """An agent with the region, and its metadata. On a thread that may wait."""
        try:
            agent, self._first = self._first, None
            agent = agent or self._make_agent()
            return agent, agent.metadata()
        except TransportError as error:
            return fresh(error)

    def carry_out(self, outcome: Outcome) -> None:
        """On the loop's thread, before anything else happens there: "go" must be said before "stop"."""
        for lease, go in outcome.answers:
            self._send(lease, Verdict(lease.serial, go))
        for lease in outcome.stops:
            self._send(lease, Stop(lease.serial))
        for epoch in outcome.revoked:
            self.outbox.post(Revoked(epoch))
        self._changed.set()

    def _carry_out_soon(self, outcome: Outcome) -> None:
        """From any other thread. A revocation that is true is reported now."""
        for epoch in outcome.revoked:
            self.outbox.post(Revoked(epoch))
        if outcome.answers or outcome.stops:
            self.loop.call(partial(self.carry_out, Outcome(outcome.answers, outcome.stops)))

    def close(self, timeout_s: float) -> bool:
        """Whether every writer has left. From any other thread."""
        self._carry_out_soon(self.gate.close_all())
        deadline = time.monotonic() + timeout_s
        while self.gate.out() and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            if self.gate.out():
                self._changed.wait(left)
        stuck = [lease for lease in self.gate.out() if isinstance(lease.holder, Incoming) and lease.holder.same_host]
        stopped = threading.Event()
        self.loop.call(partial(self._stop, stopped))
        stopped.wait(timeout_s)
        self.agents.shutdown(wait=True)
        if self._first is not None:
            self._first.close()
            self._first = None
        return not stuck

    def _make_agent(self) -> Agent:
        agent = Agent(self._backends)
        agent.register([(self.base, self._size)])
        return agent

    @staticmethod
    def _send(lease: Lease, message: Message) -> None:
        if isinstance(lease.holder, Incoming):
            lease.holder.channel.send(message)

    def _stop(self, stopped: threading.Event) -> None:
        self.listener.stop()
        for connection in list(self.listener.connections):
            connection.tear_down("the receiver is closed", logging.DEBUG)
        stopped.set()


class Incoming:
    """One sender. On the loop's thread. What it asks for is a matter of the gate; it is over when its agent is."""

    def __init__(self, server: Server, sock: socket.socket, address: str) -> None:
        self._server, self._address = server, address
        self.same_host = False
        self._greeted = self._welcomed = self._ending = False
        self._agent: Future[tuple[Agent, bytes] | TransportError] | None = None
        self.channel = Channel(
            sock,
            server.loop,
            on_message=self._on_message,
            on_fault=self._on_fault,
            on_end=lambda reason: self.tear_down(reason, logging.DEBUG),
            limit=MAX_HELLO_FRAME,
        )
        server.loop.later(HANDSHAKE_S, self._check_greeting)

    def tear_down(self, reason: str, level: int) -> None:
        """Destroys the agent, then ends the leases and the connection."""
        if self._ending:
            return
        self._ending = True
        log.log(level, "closing the connection of the sender at %s: %s", self._address, reason)
        if self._agent is None:
            self._gone()
        else:
            self._server.agents.submit(self._destroy, self._agent).add_done_callback(self._destroyed)

    def _check_greeting(self) -> None:
        if not self._greeted:
            self.tear_down(f"it did not introduce itself within {HANDSHAKE_S} s", logging.WARNING)

    def _on_fault(self, error: FrameError) -> None:
        log.warning("the sender at %s broke the format: %s", self._address, error)
        if self._greeted:
            # Its writes may go on until it notices: so let it hang up.
            self.channel.hang_up()
        else:
            self.tear_down("it is not welcome", logging.DEBUG)

    def _on_message(self, message: Message) -> None:
        match message:
            case Hello(token, boot_id) if not self._greeted:
                self._on_hello(token, boot_id)
            case Ask(serial, epoch, ranges) if self._welcomed:
                self._server.carry_out(self._server.gate.ask(self, serial, epoch, unpack_ranges(ranges)))
            case Done(serial) if self._welcomed:
                outcome = self._server.gate.done(self, serial)
                if outcome is None:
                    raise FrameError(f"done with the write {serial}, which is not in flight")
                self._server.carry_out(outcome)
            case Broken() if self._welcomed:
                self.tear_down("its engine failed", logging.INFO)
            case _:
                raise FrameError(f"a sender does not say {type(message).__name__} here")

    def _on_hello(self, token: bytes, boot_id: str) -> None:
        if not hmac.compare_digest(token, self._server.token):
            raise FrameError("wrong token: it does not come from this receiver's handle")
        self._greeted = True
        self.same_host = boot_id == self._server.boot_id
        if not self.same_host:
            # On one host the connection must end by the sender's hand or its death alone, see gate.
            set_keepalive(self.channel.sock)
        self.channel.limit = MAX_FRAME
        self._agent = self._server.agents.submit(self._server.agent)
        self._agent.add_done_callback(lambda _: self._server.loop.call(self._welcome))

    def _welcome(self) -> None:
        if self._ending or self._agent is None:
            return
        made = self._agent.result()
        if isinstance(made, TransportError):
            log.error("no agent for the sender at %s: %s", self._address, made)
            self.tear_down("there is no agent for it", logging.DEBUG)
            return
        self._welcomed = True
        self.channel.send(Welcome(made[1], self._server.base))

    # On a thread that may wait.

    @staticmethod
    def _destroy(agent: Future[tuple[Agent, bytes] | TransportError]) -> None:
        made = agent.result()
        if not isinstance(made, TransportError):
            made[0].close()

    def _destroyed(self, outcome: Future[None]) -> None:
        """If it could not be, nothing may be reported as over."""
        if error := outcome.exception():
            self._server.outbox.fail(error)
        else:
            self._server.loop.call(self._gone)

    # On the loop's thread.

    def _gone(self) -> None:
        self._server.carry_out(self._server.gate.gone(self))
        self.channel.close()
        self._server.listener.connections.discard(self)
