"""A replica of the router, which answers the requests that Ray's proxies pass on."""

from __future__ import annotations

from typing import Any

from ray import serve

from embferry.deploy.ray.names import ROUTER
from embferry.deploy.ray.proxies import check_proxies
from embferry.deploy.ray.replica_list import REPLICAS
from embferry.deploy.ray.secrets import with_api_key
from embferry.observe.logs import configure
from embferry.serve import security
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.http.app import RouterApp
from embferry.serve.supervisor.first_question import KEY


class RouterReplica:
    """The ingress of the application.

    Args:
        settings: of the deployment, without the API key.
        needs_key: refuse to run without an API key in the environment of this node.
        workers: handles of the deployments of workers.

    Raises:
        ConfigError: strangers would reach the router without an API key.
    """

    def __init__(self, settings: Settings, needs_key: bool, *workers: Any) -> None:
        name = f"{ROUTER}-{serve.get_replica_context().replica_id.unique_id}"
        configure(settings.log_level, settings.log_format, name)
        security.apply(settings)
        self._settings = with_api_key(settings)
        if needs_key and self._settings.router.api_key is None:
            raise ConfigError([f"embferry serve was given {KEY}, and this node was not: set it where Ray is started"])
        check_proxies(self._settings)
        # From its first call on, a handle is told of the replicas. It waits for one on a thread of Serve's.
        self._introductions = [handle.introduce.remote() for handle in workers]

    def __serve_build_asgi_app__(self) -> RouterApp:
        """Returns the application. Serve calls it once after the constructor, and runs its lifespan."""
        self._app = self._build()
        return self._app

    async def end_streams(self) -> None:
        """Ends what has no end of its own, such as what a page in a browser watches: Serve would wait for that."""
        await self._app.stop()

    def _build(self) -> RouterApp:
        if self._settings.router.engine == "vllm":  # the router before it loads less
            from embferry.serve.vllm import app as before_vllm

            return before_vllm.build(self._settings, source=REPLICAS)
        from embferry.serve.router import app as before_workers

        return before_workers.build(self._settings, source=REPLICAS)


def ingress() -> type[Any]:
    """Returns the class for Serve, which has no place for the methods of an application of its own."""
    made: type[Any] = serve.ingress()(RouterReplica)
    return made
