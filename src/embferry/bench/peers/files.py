"""A safetensors file in a folder that both sides see, as vLLM's example connector for encoder caches does it.

One file a request: ``save_file``, then the other side is told, then ``load_file``. The folder is local (``--storage``),
so writes end in the page cache: a network file system is slower. No ``fsync``, for the connector has none either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..contract import Bytes, Facts, Job, Link, Receiving, Sending

TENSOR = "ec_cache"


class FilesSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._job, self._link = source, job, link
        self._tensor = source.view(np.float16).reshape(job.tokens, -1)  # numpy has no bfloat16; 2 bytes an element too

    def stage(self, number: int) -> Facts:
        self._path = Path(self._job.folder) / f"{self._job.contestant}-{number}.safetensors"
        return {"path": str(self._path)}

    def send(self) -> None:
        save_file({TENSOR: self._tensor}, self._path)
        self._link.tell()

    def finish(self) -> Facts:
        self.moved += self._path.stat().st_size
        self._path.unlink()
        return {}

    def close(self) -> None:
        pass


class FilesReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._link = link
        self._tensor: Bytes = np.empty(0, np.uint8)

    def arm(self, number: int, staged: Facts) -> None:
        self._path = staged["path"]

    def receive(self) -> None:
        self._link.wait()
        self._tensor = load_file(self._path)[TENSOR].view(np.uint8)

    def arrays(self) -> list[Bytes]:
        return [self._tensor]

    def finish(self) -> Facts:
        self._tensor = np.empty(0, np.uint8)
        return {}

    def close(self) -> None:
        pass
