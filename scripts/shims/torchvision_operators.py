"""Lets torchvision's wheel for CUDA import beside torch for CPUs: defines the operators that it registers kernels for.

An environment imports this file at the start of Python. It does nothing until torchvision is imported.
"""

import importlib.abc
import sys


class _Finder(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _Finder.library is None:
            import torch

            if torch.version.cuda is None:
                _Finder.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    _Finder.library.define(f"{operator}(Tensor x) -> Tensor")
        return


sys.meta_path.insert(0, _Finder())
