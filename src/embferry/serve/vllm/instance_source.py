"""Where a router before vLLM learns which instances there are, unless the settings name them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from embferry.serve.vllm.instance import Role


class InstanceSource(Protocol):
    """Tells which instances there are, where that is not in the settings."""

    def urls(self, role: Role) -> Collection[str]:
        """Returns the URLs of the instances of a role."""
        ...

    async def wait(self) -> None:
        """Waits until they may have changed."""
        ...
