"""The limit of the machine: ``numpy.copyto`` from tensor to tensor inside one process, nothing else.

Source and destination lie in the receiving process, which also keeps the time; the other process only says when.
``to``: ``private`` memory that was touched before, ``shared`` memory that was touched before, or a ``fresh`` array, as
a language worker that allocates for each request has it."""

from __future__ import annotations

import mmap
import time

import numpy as np

from .. import content
from ..contract import Bytes, Facts, Job, Link, Receiving, Sending


class CopySending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._link = source, link

    def send(self) -> None:
        self._link.tell()
        self.moved += self.source.nbytes

    def close(self) -> None:
        pass


class CopyReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._link, self._fresh = link, job.options["to"] == "fresh"
        self._source = content.make(job.size)
        if job.options["to"] == "shared":
            self._tensor: Bytes = np.frombuffer(mmap.mmap(-1, job.size), np.uint8)  # anonymous mappings are shared here
        else:
            self._tensor = np.empty(job.size, np.uint8)

    def arm(self, number: int, staged: Facts) -> None:
        content.stamp(self._source, number)

    def receive(self) -> None:
        self._link.wait()
        began = time.monotonic_ns()
        if self._fresh:
            self._tensor = np.empty(len(self._source), np.uint8)
        np.copyto(self._tensor, self._source)
        self._seconds = (time.monotonic_ns() - began) / 1e9

    def finish(self) -> Facts:
        if self._fresh:
            self._tensor = np.empty(0, np.uint8)
        return {"seconds": self._seconds}

    def arrays(self) -> list[Bytes]:
        return [self._tensor]

    def close(self) -> None:
        pass
