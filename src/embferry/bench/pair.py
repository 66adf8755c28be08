"""A contestant's two processes, and one round between them."""

from __future__ import annotations

import socket
import time

from .child import Child, ContestantError
from .contract import Facts, Job
from .results import Sample

KILL_S = 0.5
"""What one that has failed gets to end by itself."""


class Pair:
    """Sender and receiver of one contestant. Starting takes time and has two steps, so that several start at once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        ours, theirs = socket.socketpair()
        self._receiver = Child("receiver", job, ours)
        try:
            self._sender = Child("sender", job, theirs)
        except BaseException:
            self._receiver.end(0.0)
            raise
        self.pool_bytes = 0
        self.memory_method = ""

    def begin(self) -> None:
        """Has both make their ends. :meth:`connect` waits for them."""
        job = {name: getattr(self.job, name) for name in self.job.__struct_fields__}
        self._receiver.ask("make", role="receiving", job=job)
        self._sender.ask("make", role="sending", job=job)

    def connect(self) -> None:
        receiver, sender = self._receiver.answer("make"), self._sender.answer("make")
        self.pool_bytes = receiver["pool_bytes"]
        self._receiver.call("connect", other=sender["address"])
        self._sender.call("connect", other=receiver["address"])

    def run(self, number: int, *, verify: bool) -> Sample:
        """One round.

        :param verify: compare digests of all bytes, after the clock has stopped.
        :raises ContestantError: an end failed or the bytes differ."""
        try:
            return self._run(number, verify)
        except ContestantError as error:
            # One end's failure is often but the echo of the other's: both are told.
            others = [child.failure() for child in (self._sender, self._receiver) if child.role != error.role]
            raise ContestantError(error.role, "; ".join([str(error), *filter(None, others)])) from None

    def _run(self, number: int, verify: bool) -> Sample:
        staged = self._sender.call("stage", number=number)
        self._receiver.call("arm", number=number, staged=staged)
        self._sender.ask("go")
        ready = self._receiver.answer("receive")
        went = self._sender.answer("go")
        if verify:
            self._compare()
        received, sent = self._receiver.call("finish"), self._sender.call("finish")
        self.memory_method = received["memory_method"]
        return Sample(
            seconds=received["details"].pop("seconds", (ready["at"] - went["at"]) / 1e9),
            sender_cpu=sent["cpu"],
            receiver_cpu=received["cpu"],
            wire_bytes=_wire(self.job.size, sent, received),
            memory_beyond=received["memory"],
            details=_details(sent["details"], received["details"], went["at"]),
        )

    def park(self) -> None:
        self._sender.park()
        self._receiver.park()

    def resume(self) -> None:
        self._receiver.resume()
        self._sender.resume()

    @property
    def pids(self) -> tuple[int, int]:
        return self._sender.pid, self._receiver.pid

    def ask_to_close(self) -> None:
        """Begins to end both in peace; :meth:`end` waits for it."""
        for child in (self._sender, self._receiver):
            child.ask_to_close()

    def end(self, patience_s: float) -> None:
        """Both have ended when this returns: by themselves within the time, or killed."""
        deadline = time.monotonic() + patience_s
        for child in (self._sender, self._receiver):
            child.end(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Ends both at once, for one that has failed."""
        self.ask_to_close()
        self.end(KILL_S)

    def _compare(self) -> None:
        sent = self._sender.call("digests")["digests"]
        came = self._receiver.call("digests")["digests"]
        if not came or set(came) != set(sent):
            raise ContestantError("both", f"the bytes that came are not those that were sent: digests {came} of {sent}")


def _wire(size: int, sent: Facts, received: Facts) -> int | None:
    """Bytes that crossed. What went by TCP is known for any library; if it is less than the payload, the rest went by
    other ways, which only some ends can count."""
    tcp = int(sent["tcp"] + received["tcp"])
    if tcp >= size:
        return tcp
    return tcp + int(sent["moved"]) if sent["moved"] else None


def _details(sent: Facts, received: Facts, began: int) -> Facts:
    return {**sent, **received, "began": began} if sent or received else {}
