"""Lets SGLang import on a CPU without what it has for GPUs: stand-ins for triton and sgl_kernel, which it only imports.

An environment imports this file at the start of Python. It does nothing until one of the modules is imported. A
function of theirs that SGLang calls raises an error that names it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

PACKAGES = ("triton", "sgl_kernel")
LOOKED_UP_AT_IMPORT = (  # by sglang.srt.models.qwen3_5: operators of SGLang's own for CPUs, which are not on PyPI
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


class Absent:
    """Something that is not there: it may be passed around and used as a decorator or a base class, not called."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.__name__.startswith("triton.knobs"):  # settings of kernels that are never loaded
            return
        raise NotImplementedError(f"{self.__name__} does not exist on this CPU")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __getitem__(self, grid: Any) -> Absent:
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class Kernel(Absent):
    """A function that triton would have compiled."""

    def __init__(self, function: Any) -> None:
        super().__init__(getattr(function, "__qualname__", str(function)))
        self.fn = function
        self.__doc__ = getattr(function, "__doc__", None)


def jit(*args: Any, **kwargs: Any) -> Any:
    """Stands in for triton's decorators, with and without arguments."""
    if args and callable(args[0]) and not kwargs:
        return args[0] if isinstance(args[0], Kernel) else Kernel(args[0])
    return lambda function: function if isinstance(function, Kernel) else Kernel(function)


class StandIn(types.ModuleType):
    """A module that has every attribute: of triton, names in capitals are types, because torch asks isinstance."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        is_type = self.__name__.startswith("triton") and name[0].isupper() and not name.isupper()
        value = type(name, (), {}) if is_type else Absent(full)
        setattr(self, name, value)
        return value


def fill(module: Any) -> None:
    """Gives a stand-in what is called at import."""
    if module.__name__ == "triton":
        module.__version__ = "0.0"
        module.jit = module.autotune = module.heuristics = jit
        module.cdiv = lambda a, b: -(-a // b)
        module.next_power_of_2 = lambda n: 1 << max(0, n - 1).bit_length()
        module.Config = type("Config", (), {"__init__": lambda self, *args, **kwargs: None})
    elif module.__name__ == "triton.language":
        module.constexpr = type("constexpr", (), {"__init__": lambda self, value=None: setattr(self, "value", value)})
        module.dtype = type("dtype", (), {})
        module.tensor = type("tensor", (), {})
    elif module.__name__ == "sgl_kernel":
        module.__version__ = "9.9.9"


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module: Any = StandIn(spec.name)
        module.__path__ = []
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: types.ModuleType) -> None:
        fill(module)


class _Finder(importlib.abc.MetaPathFinder):
    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == "sglang.srt" and _Finder.library is None:
            import torch

            library: Any = torch.library
            _Finder.library = library.Library("sgl_kernel", "DEF")
            for operator in LOOKED_UP_AT_IMPORT:
                _Finder.library.define(f"{operator}(Tensor x) -> Tensor")
        if name.partition(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, _Loader(), is_package=True)
        return None


sys.meta_path.insert(0, _Finder())
