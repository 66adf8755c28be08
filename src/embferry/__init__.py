"""Resumable transfer of multimodal embeddings for vision-language models served in separate workers.

``from embferry import SendManager, ReceiveManager, …``: :mod:`embferry.library` lists the public names, and
``docs/library.md`` shows how to use them.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .library import *  # noqa: F403
else:

    def __getattr__(name):
        """Imports the library when one of its names is first used: the command line starts without numpy."""
        from importlib import import_module

        library = import_module(".library", __name__)
        if name not in library.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(library, name)

    def __dir__():
        """Returns the names of the module, the library's among them."""
        from importlib import import_module

        return sorted({*globals(), *import_module(".library", __name__).__all__})
