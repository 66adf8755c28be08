"""Candidates that fail in different ways; worker processes import them."""

from __future__ import annotations

import os
import signal
import sys
import threading

import numpy as np

from embferry.bench.transfer.contract import Bytes, Receiving, Sending, UnavailableError


class KilledSending(Sending):
    pass


class KilledReceiving(Receiving):
    """Is killed in its first round, like an engine that crashes."""

    def receive(self) -> None:
        print("the last line of an engine", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class RaisingSending(Sending):
    def send(self) -> None:
        raise RuntimeError("the network is down")


class RaisingReceiving(Receiving):
    pass


class SilentSending(Sending):
    def send(self) -> None:
        pass


class SilentReceiving(Receiving):
    """Never returns from a round."""

    def receive(self) -> None:
        threading.Event().wait()


class WrongSending(Sending):
    pass


class WrongReceiving(Receiving):
    """Returns other bytes than those that were sent."""

    def each(self) -> list[list[Bytes]]:
        return [[np.zeros(self.job.size, np.uint8)]]


class AbsentSending(Sending):
    pass


class AbsentReceiving(Receiving):
    def setup(self) -> None:
        raise UnavailableError("its licence is missing; buy one")
