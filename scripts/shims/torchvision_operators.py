"""Lets torchvision's wheel for CUDA import beside torch for CPUs: defines the operators that it registers kernels for.

An environment imports this file at the start of Python. It does nothing until torchvision is imported.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and _Finder.library is None:
            import torch

            if torch.version.cuda is None:
                library: Any = torch.library
                _Finder.library = library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    _Finder.library.define(f"{operator}(Tensor x) -> Tensor")
        return


sys.meta_path.insert(0, _Finder())
