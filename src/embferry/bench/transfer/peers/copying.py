"""The limit of the machine: ``numpy.copyto`` inside one process.

Source and destination are in the receiving process, which also takes the time; the other process only says when. The
option ``to`` is ``private`` or ``shared`` memory that has been touched before, or a ``fresh`` array, as a language
worker has it that allocates for each request.
"""

from __future__ import annotations

import mmap
import time

import numpy as np

from .. import payloads
from ..contract import Facts, Job, Link, Sending, TensorReceiving


class CopySending(Sending):
    def send(self) -> None:
        self.link.tell()


class CopyReceiving(TensorReceiving):
    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self._source = payloads.make(job.size)
        self._fresh = job.options["to"] == "fresh"
        if job.options["to"] == "shared":
            self.tensor = np.frombuffer(mmap.mmap(-1, job.size), np.uint8)  # an anonymous mapping is shared by default

    def arm(self, number: int, staged: Facts) -> None:
        payloads.stamp(self._source, number)

    def receive(self) -> None:
        self.link.wait()
        began = time.monotonic_ns()
        if self._fresh:
            self.tensor = np.empty(len(self._source), np.uint8)
        np.copyto(self.tensor, self._source)
        self._seconds = (time.monotonic_ns() - began) / 1e9

    def finish(self) -> Facts:
        if self._fresh:
            self.tensor = np.empty(0, np.uint8)
        return {"seconds": self._seconds}
