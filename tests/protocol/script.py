"""A simulation driven step by step: which message arrives and which write lands, in which order."""

from __future__ import annotations

import dataclasses

import msgspec

from embferry.protocol.errors import Aborted
from embferry.protocol.kept import KeptTokens
from embferry.protocol.messages import Body, Offer, Open, Written, decode, encode

from .ends import Content, EncodeEnd, LanguageEnd
from .simulation import Simulation

ROOM = 0
Kind = type[Body]


class Script(Simulation):
    """A simulation of one room, with blocks of two tokens and chunks of one block. Every event is a call."""

    def __init__(
        self,
        total: int,
        num_blocks: int,
        *,
        ready: int | None = None,
        checks_windows: bool = False,
        eager: bool = False,
    ) -> None:
        super().__init__(num_blocks, 2, checks_windows=checks_windows, eager=eager)
        self.start_encoder(ROOM, Content(1, total)).produce(total if ready is None else ready)
        self.start_receiver(ROOM)
        self.run()

    @property
    def encoder(self) -> EncodeEnd:
        return self.encoders[-1]

    @property
    def receiver(self) -> LanguageEnd:
        return self.receivers[-1]

    def where(self, kind: Kind) -> list[int]:
        """Returns the indices of the messages of a kind in the network, oldest first."""
        bodies = [decode(packet.data).body for packet in self.network.packets]
        return [index for index, body in enumerate(bodies) if isinstance(body, kind)]

    def arrives(self, *kinds: Kind) -> None:
        """Delivers the oldest message of each kind, in this order."""
        for kind in kinds:
            self.deliver(self.where(kind)[0])

    def newest_arrives(self, kind: Kind) -> None:
        self.deliver(self.where(kind)[-1])

    def arrives_if_sent(self, *kinds: Kind) -> None:
        for kind in kinds:
            if self.where(kind):
                self.arrives(kind)

    def loses(self, kind: Kind) -> None:
        """Drops all messages of a kind."""
        for index in reversed(self.where(kind)):
            self.network.lose(index)

    def keep_copy(self, kind: Kind) -> None:
        """Keeps a copy of the oldest message of a kind for :meth:`copy_arrives`."""
        packet = self.network.packets[self.where(kind)[0]]
        self._kept = packet

    def copy_arrives(self) -> None:
        """Delivers the copy."""
        self.network.packets.insert(0, self._kept)
        self.deliver(0)

    def loses_its_checksums(self) -> None:
        """Removes the checksums from the oldest report."""
        index = self.where(Written)[0]
        packet = self.network.packets[index]
        frame = decode(packet.data)
        assert isinstance(frame.body, Written)
        chunks = tuple(msgspec.structs.replace(chunk, checksum=None) for chunk in frame.body.chunks)
        body = msgspec.structs.replace(frame.body, chunks=chunks)
        data = encode(msgspec.structs.replace(frame, body=body))
        self.network.packets[index] = dataclasses.replace(packet, data=data)

    def handshake(self) -> None:
        """Delivers the ``Open`` and the ``Offer``. The free blocks of the pool are granted."""
        self.arrives(Open, Offer)

    def chunk_arrives(self) -> None:
        """Completes the oldest write, delivers its report and verifies the chunk."""
        self.complete(self.memory.in_flight[0])
        self.arrives(Written)
        self.verify(self.receiver)

    def consume_first(self) -> None:
        """Consumes the first chunk. Its block returns to the pool and is granted again."""
        self.consume(self.receiver)

    def complete_writes(self) -> None:
        """Completes every write in flight."""
        for write in list(self.memory.in_flight):
            self.complete(write)

    def replace_encoder(self, number: int = 1, ready: bool = True) -> None:
        """Restarts the encode worker, with the same embedding or another one of the same length."""
        total = self.encoder.content.total
        end = self.start_encoder(ROOM, Content(number, total))
        if ready:
            end.produce(total)
        self.break_link()

    def break_link(self) -> None:
        """The receiver loses its peer, and connects again."""
        self.loses(Open)
        self.loses(Offer)
        self.redirect(self.receiver, self.receiver.endpoint)
        self.handshake()

    def restart_receiver(self, kept: KeptTokens | None) -> None:
        """Kills the receiver. Another one opens the room, and begins with tokens that are kept."""
        self.kill_receiver(self.receiver)
        self.loses(Open)
        self.loses(Offer)
        self.start_receiver(ROOM, kept=kept)

    def abort_receiver(self) -> None:
        """The receiver aborts."""
        self.receiver.machine.abort(Aborted("asked for", room=ROOM), self.now)
        self.run()

    def start_another_room(self) -> None:
        """Starts a second transfer, which is granted the blocks that are free."""
        self.start_encoder(1, Content(2, 2)).produce(2)
        self.start_receiver(1)
        self.newest_arrives(Open)
        self.newest_arrives(Offer)
