"""Contestants that fail, each in its way. Made by worker processes."""

from __future__ import annotations

import os
import signal
import sys
import threading

from embferry.bench.contract import Bytes, Facts, Job, Link, Receiving, Sending, UnavailableError


class _Sending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self.link = source, link

    def send(self) -> None:
        self.link.tell()

    def close(self) -> None:
        pass


class _Receiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self.job, self.link = job, link

    def receive(self) -> None:
        self.link.wait()

    def arrays(self) -> list[Bytes]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class KilledSending(_Sending):
    pass


class KilledReceiving(_Receiving):
    """Dies in its first round, as an engine that crashes does."""

    def receive(self) -> None:
        print("the last words of an engine", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class RaisingSending(_Sending):
    def send(self) -> None:
        raise RuntimeError("the transport is closed")


class RaisingReceiving(_Receiving):
    pass


class SilentSending(_Sending):
    def send(self) -> None:
        pass


class SilentReceiving(_Receiving):
    """Waits for what never comes."""

    def receive(self) -> None:
        threading.Event().wait()


class WrongSending(_Sending):
    pass


class WrongReceiving(_Receiving):
    """Shows other bytes than those that were sent."""

    def arrays(self) -> list[Bytes]:
        import numpy as np

        return [np.zeros(self.job.size, np.uint8)]


class AbsentSending(_Sending):
    pass


class AbsentReceiving(_Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        raise UnavailableError("its licence is missing; buy one")

    def address(self) -> Facts:
        return {}
