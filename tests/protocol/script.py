"""Words to write short scripts in: which message arrives, which write lands, one after another."""

from __future__ import annotations

import dataclasses

import msgspec

from embferry.protocol.errors import Aborted
from embferry.protocol.messages import Body, Offer, Open, Written, decode, encode

from .ends import Content, EncodeEnd, LanguageEnd
from .simulation import World

ROOM = 0
Kind = type[Body]


class Script(World):
    """A world with one room in which blocks have two tokens and chunks one block. Nothing happens but what is said."""

    def __init__(
        self, total: int, num_blocks: int, *, ready: int | None = None, gated: bool = False, eager: bool = False
    ) -> None:
        super().__init__(num_blocks, 2, gated=gated, eager=eager)
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
        """Where messages of a kind are in the network, the oldest first."""
        bodies = [decode(packet.data).body for packet in self.network.packets]
        return [index for index, body in enumerate(bodies) if isinstance(body, kind)]

    def arrives(self, *kinds: Kind) -> None:
        """The oldest message of each kind arrives, one after another."""
        for kind in kinds:
            self.deliver(self.where(kind)[0])

    def newest_arrives(self, kind: Kind) -> None:
        self.deliver(self.where(kind)[-1])

    def arrives_if_sent(self, *kinds: Kind) -> None:
        for kind in kinds:
            if self.where(kind):
                self.arrives(kind)

    def lost(self, kind: Kind) -> None:
        """All messages of a kind are lost."""
        for index in reversed(self.where(kind)):
            self.network.lose(index)

    def keep(self, kind: Kind) -> None:
        """A copy of the oldest message of a kind is delayed until :meth:`late`."""
        packet = self.network.packets[self.where(kind)[0]]
        self._kept = packet

    def late(self) -> None:
        """What was kept arrives."""
        self.network.packets.insert(0, self._kept)
        self.deliver(0)

    def loses_its_checksums(self) -> None:
        """The oldest report is on its way without its checksums."""
        index = self.where(Written)[0]
        packet = self.network.packets[index]
        frame = decode(packet.data)
        assert isinstance(frame.body, Written)
        chunks = tuple(msgspec.structs.replace(chunk, checksum=None) for chunk in frame.body.chunks)
        body = msgspec.structs.replace(frame.body, chunks=chunks)
        data = encode(msgspec.structs.replace(frame, body=body))
        self.network.packets[index] = dataclasses.replace(packet, data=data)

    def meet(self) -> None:
        """The receiver's opening arrives, and the offer; what the pool has free is granted."""
        self.arrives(Open, Offer)

    def chunk(self) -> None:
        """The oldest write completes, its report arrives, its bytes are good."""
        self.complete(self.memory.flights[0])
        self.arrives(Written)
        self.verify(self.receiver)

    def use(self) -> None:
        """The first chunk is consumed; its block goes back to the pool and on to whoever waits."""
        self.consume(self.receiver)

    def all_land(self) -> None:
        """Whatever was being written completes."""
        for flight in list(self.memory.flights):
            self.complete(flight)

    def replace_encoder(self, number: int = 1, ready: bool = True) -> None:
        """The encode worker is restarted, with the same embedding or another one of the same length."""
        total = self.encoder.content.total
        end = self.start_encoder(ROOM, Content(number, total))
        if ready:
            end.produce(total)
        self.break_link()

    def break_link(self) -> None:
        self.lost(Open)
        self.lost(Offer)
        self.redirect(self.receiver, self.receiver.endpoint)
        self.meet()

    def give_up(self) -> None:
        """The receiver aborts."""
        self.receiver.machine.abort(Aborted("asked for", room=ROOM), self.now)
        self.run()

    def another_room(self) -> None:
        """Its blocks are those that are free now."""
        self.start_encoder(1, Content(2, 2)).produce(2)
        self.start_receiver(1)
        self.newest_arrives(Open)
        self.newest_arrives(Offer)
