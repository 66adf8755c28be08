"""A safetensors file in a folder that both sides see, as vLLM's example connector for encoder caches uses it.

One file a request, written by ``save_file`` and read by ``load_file``. The folder is local unless ``--storage`` names
another, so writes end in the page cache; a network file system is slower. No ``fsync``, like the connector.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..contract import Bytes, Facts, Job, Link, Sending, TensorReceiving

TENSOR = "ec_cache"


class FilesSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        super().__init__(job, source, link)
        self._tensor = source.view(np.float16).reshape(job.tokens, -1)  # numpy has no bfloat16; 2 bytes an element too

    def stage(self, number: int) -> Facts:
        self._path = Path(self.job.folder) / f"{self.job.candidate}-{number}.safetensors"
        return {"path": str(self._path)}

    def send(self) -> None:
        save_file({TENSOR: self._tensor}, self._path)
        self.link.tell()

    def finish(self) -> Facts:
        self._path.unlink()
        return {}


class FilesReceiving(TensorReceiving):
    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self.tensor = np.empty(0, np.uint8)

    def arm(self, number: int, staged: Facts) -> None:
        self._path = staged["path"]

    def receive(self) -> None:
        self.link.wait()
        self.tensor = load_file(self._path)[TENSOR].view(np.uint8)

    def finish(self) -> Facts:
        self.tensor = np.empty(0, np.uint8)
        return {}
