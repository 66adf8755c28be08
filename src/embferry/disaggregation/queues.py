"""The base of the queues of both sides."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import KVPoll
from embferry.transfer.failures import as_transfer_error
from embferry.transfer.receive_handle import EmbeddingReceiver
from embferry.transfer.send_handle import EmbeddingSender
from embferry.trust.occasions import Occasions, more

if TYPE_CHECKING:  # the origin's wire needs pyzmq, our own does not
    from .mooncake.encode_manager import MooncakeEmbeddingSender
    from .mooncake.language_manager import MooncakeEmbeddingReceiver

log = logging.getLogger(__name__)

SendingEnd: TypeAlias = "EmbeddingSender | MooncakeEmbeddingSender"
ReceivingEnd: TypeAlias = "EmbeddingReceiver | MooncakeEmbeddingReceiver"

Request = TypeVar("Request")


class RequestQueue(ABC, Generic[Request]):
    """Requests in the order of their arrival.

    Args:
        failed: Called with a request that has failed and its error, by the ``pop_`` method that removes it from its
            queue. The others go on.
    """

    def __init__(self, failed: Callable[[Request, EmbeddingTransferError], None]) -> None:
        self.failed = failed
        self.queue: list[Request] = []
        self._failures = Occasions()

    def __len__(self) -> int:
        return len(self.queue)

    def _log_failure(self, error: EmbeddingTransferError, transferred_tokens: int | None = None) -> None:
        """Logs that a transfer has failed, once a minute for each code: clients cause it by leaving."""
        count = self._failures.count(error.code)
        after = "" if transferred_tokens is None else f" after {transferred_tokens} tokens"
        level = logging.DEBUG if count is None else logging.WARNING
        log.log(level, "a transfer failed%s: %s%s", after, error, more(count or 0))

    @abstractmethod
    def _fail(self, request: Request) -> None:
        """Reports a request that has failed."""

    def _pop(self, result: Callable[[Request], KVPoll | None]) -> list[Request]:
        """Removes the requests that have a result. Returns the ones among them that have not failed.

        A request whose result raises has failed with that error; the others go on.
        """
        popped = []
        for request in list(self.queue):
            try:
                status = result(request)
            except Exception as error:
                log.error("a request of a queue has failed", exc_info=error)
                self.queue.remove(request)
                self.failed(request, as_transfer_error("a request of a queue", error))
                continue
            if status is not None:
                self.queue.remove(request)
                if status is KVPoll.Failed:
                    self._fail(request)
                else:
                    popped.append(request)
        return popped
