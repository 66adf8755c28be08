"""One embedding on its way to a consumer, or here: it goes on with another producer when its own is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from embferry import EmbeddingReceiver, GatherSink, ReceiveManager
from embferry.protocol.errors import EmbeddingTransferError, IntegrityError, PeerGone, RemoteProtocolError
from embferry.protocol.states import KVPoll

from .coordinates import Coordinates, digest_of
from .router import Router
from .shared import Fields, SharedRows
from .tally import Tally

log = logging.getLogger(__name__)


class Arrival:
    """Begins with its making. Progress needs nobody to call :meth:`poll`.

    :param router: asked for another producer, if the coordinates have a token for that; for the first one, if they have
        no endpoint.
    :param ranks: of the workers that will copy it.
    :param tried: other rooms of the same embedding from which it could not be had.
    :param news: called when it is here or will not come, from a thread of the library.
    :raises PeerGone: nobody offers it, and there is no router to ask.
    """

    def __init__(
        self,
        where: Coordinates,
        manager: ReceiveManager,
        router: Router | None,
        ranks: int,
        tally: Tally,
        tried: frozenset[int] = frozenset(),
        news: Callable[[], object] = lambda: None,
    ) -> None:
        self.where = where
        self.rooms = tried | {where.room}
        self.users: set[str] = set()
        self.ready = False
        self.shared: SharedRows | None = None
        self._router, self._ranks, self._tally = router if where.replacement else None, ranks, tally
        self._manager, self._news = manager, news
        self._began = time.monotonic()
        self._digests = {where.digest}
        self._lost: EmbeddingTransferError | None = None  # the last loss that the router was asked about
        self._receiver: EmbeddingReceiver | None = None
        self._first = threading.Lock()  # for what follows, between poll() and close() and the router's thread
        self._awaits_first = False
        self._failure: EmbeddingTransferError | None = None
        if where.endpoint is None:
            self._ask_for_first()
        else:
            self._open(where.endpoint)

    def poll(self) -> bool:
        """Whether it is here, whole and verified.

        :raises EmbeddingTransferError: it will not come; this is why.
        """
        with self._first:
            if self._failure is not None:
                raise self._failure
        if self._receiver is None:
            return self.ready
        status, tokens = self._receiver.poll(), self._receiver.total_embedding_length
        if tokens not in (-1, self.where.tokens):
            why = f"the producer has {tokens} tokens where {self.where.tokens} were announced; encode it again"
            raise RemoteProtocolError(why, room=self.where.room)
        if status is KVPoll.Failed:
            raise self._receiver.failure_exception()
        if status is KVPoll.Success:
            self._finish(self._receiver)
        return self.ready

    @property
    def may_go(self) -> bool:
        """Whether nobody needs it, and no rank may still be about to map it."""
        return self.ready and not self.users and self.shared is not None and not self.shared.is_lent

    def close(self, outcome: str = "aborted") -> None:
        """Gives it up, if it is on its way; nobody can map it from now on."""
        with self._first:
            self._awaits_first = False
        if self._receiver is not None:
            self._receiver.abort()
            self._count(self._receiver, outcome)
            self._receiver.clear()
            self._receiver = None
        if self.shared is not None:
            self.shared.close()
            self.shared = None

    def _open(self, endpoint: str) -> None:
        timeout = None if self._router is None else self._router.wait_s
        sink = GatherSink(make=self._make)
        receiver = self._manager.open(self.where.room, endpoint, sink, failover_timeout=timeout)
        receiver.on_change(lambda: self._changed(receiver))
        self._receiver = receiver
        receiver.init()

    def _make(self, tokens: int) -> dict[str, Fields]:
        if tokens != self.where.tokens:
            return {}  # refused by the sink; poll() says why
        if self.shared is None:
            self.shared = SharedRows.make(tokens, self.where.layout.token_bytes, self._ranks)
        return {"input_embeddings": self.shared.rows}

    def _finish(self, receiver: EmbeddingReceiver) -> None:
        rows = receiver.arrays()["input_embeddings"]
        same = digest_of(rows, self.where.dtype, self.where.width).hex() in self._digests
        if not same or self.shared is None:
            raise IntegrityError("what arrived is not what was announced; encode it again", room=self.where.room)
        self._count(receiver, "success")
        receiver.clear()
        self._receiver = None
        self.ready = True

    def _count(self, receiver: EmbeddingReceiver, outcome: str) -> None:
        token_bytes, came = self.where.layout.token_bytes, receiver.examined_tokens
        self._tally.add("transfers", label=outcome)
        self._tally.add("resumed_transfers", max(0, receiver.transfers - 1))
        self._tally.add("wire_bytes", came * token_bytes)
        if outcome == "success":
            self._tally.add("tokens", self.where.tokens)
            self._tally.add("embedding_bytes", self.where.nbytes)
            self._tally.add("bytes_sent_twice", max(0, came - self.where.tokens) * token_bytes)
            self._tally.took(time.monotonic() - self._began)

    # The first producer, where none is named

    def _ask_for_first(self) -> None:
        if self._router is None:
            why = "it is not here any more, nobody offers it, and there is no router to ask (ec_connector_extra_config)"
            raise PeerGone(why, room=self.where.room)
        self._awaits_first = True
        self._tally.add("asked_again")
        asked = self._router.replacement(self.where, PeerGone("it is not kept here any more", room=self.where.room))
        asked.add_done_callback(self._named)

    def _named(self, answer: Future[Coordinates]) -> None:
        """On the router's thread."""
        with self._first:
            if answer.cancelled() or not self._awaits_first:
                return
            self._awaits_first = False
            try:
                self._open(self._taken(answer.result()))
            except EmbeddingTransferError as error:
                self._failure = PeerGone(
                    f"it is not here any more, and cannot be had again: {error.detail}", room=self.where.room
                )
                self._news()

    # Another producer

    def _changed(self, receiver: EmbeddingReceiver) -> None:
        """On the manager's thread, which must not wait."""
        if receiver.poll() in (KVPoll.Success, KVPoll.Failed):
            self._news()
        lost = receiver.lost
        if self._router is None or lost is None or lost is self._lost:
            return
        self._lost = lost
        log.warning("the producer at %s is lost, needs resume for remaining data: %s", self.where.endpoint, lost)
        self._tally.add("losses", label=lost.code)
        asked = self._router.replacement(self.where, lost)
        asked.add_done_callback(lambda answer: self._answered(receiver, lost, answer))

    def _answered(self, receiver: EmbeddingReceiver, lost: EmbeddingTransferError, answer: Future[Coordinates]) -> None:
        """On the router's thread."""
        if answer.cancelled() or self._receiver is not receiver:
            return
        try:
            receiver.redirect(self._taken(answer.result()))
        except EmbeddingTransferError as error:
            self._tally.add("replacements", label="none")
            why = f"{lost.detail}; no other producer went on: {error.detail}"
            receiver.abort(type(lost)(why, room=lost.room, retryable=lost.retryable))
        else:
            self._tally.add("replacements", label="found")
            log.info("room %d goes on at %s", self.where.room, self.where.endpoint)

    def _taken(self, other: Coordinates) -> str:
        """Where it comes from, from now on."""
        mine, theirs = (
            (where.room, where.tokens, where.width, where.dtype, where.version) for where in (self.where, other)
        )
        if mine != theirs:
            raise RemoteProtocolError(
                f"the router named an embedding {theirs} in place of {mine}", room=self.where.room
            )
        if other.endpoint is None:
            raise RemoteProtocolError("the router named nobody who offers it", room=self.where.room)
        self._digests.add(other.digest)
        self.where = other
        return other.endpoint
