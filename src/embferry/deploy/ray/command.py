"""``embferry serve --on ray``: the application on a Ray cluster, in the foreground."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from embferry.deploy.ray import cluster, ending, proxies
from embferry.deploy.ray.application import application, unusable
from embferry.deploy.ray.causes import cause, has_failed
from embferry.deploy.ray.loss import RayWatch
from embferry.deploy.ray.names import APPLICATION
from embferry.deploy.ray.secrets import without_api_key
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.end_signals import EndSignals
from embferry.serve.http.address import bracketed, get
from embferry.serve.supervisor.first_question import KEY
from embferry.serve.supervisor.local import LOOPBACK
from embferry.serve.supervisor.ports import problems, wanted_router
from embferry.serve.supervisor.serve import ENDING, end, invite

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
READY_SECONDS = 2.0
KILLED = 130
"""The status of a process that a second Ctrl-C has ended."""
LOGGING = LoggingConfig(log_level="WARNING")
"""For Serve's controller and proxies: this command tells itself how far the application is."""


class _FailedError(Exception):
    """The application cannot be brought up. ``reasons``: one sentence each."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def run(settings: Settings) -> None:
    """Starts the application and keeps it until SIGINT or SIGTERM; a second one ends this process at once.

    Ends the process with status 1 if the application cannot be brought up.

    Raises:
        ConfigError: the settings cannot be used on Ray.
        TransportError: the Ray cluster cannot be reached.
    """
    began = time.monotonic()
    needs_key = settings.router.api_key is not None and settings.place("router", "api_key") == KEY
    shared = without_api_key(settings) if needs_key else settings
    wrong = unusable(shared)
    if not settings.router.port:
        wrong.append(f"{settings.place('router', 'port')} 0: Ray's proxies need the number of a port")
    if wrong:
        raise ConfigError(wrong)
    port = wanted_router(settings)._replace(may_be_any=False)
    if settings.ray.address is None and (taken := problems(settings, [port])):
        end(taken, 1)
    log.info("%s", "starting Ray on this machine" if settings.ray.address is None else "connecting to the Ray cluster")
    cluster.connect(settings)
    failed: tuple[str, ...] = ()
    watch = RayWatch()
    interrupts = _Interrupts(watch)
    with watch, EndSignals(handle=interrupts) as signals:
        try:
            with _serve(settings) as url:
                if _bring_up(shared, needs_key, url, interrupts):
                    name, seconds = settings.public_model_name, time.monotonic() - began
                    log.info("ready: %s at %s/v1 after %.1f s", name, url, seconds)
                    log.info("watch it at work: %s/", url)
                    invite(url, settings)
                signals.wait()
                log.info(ENDING)
        except _FailedError as error:
            failed = error.reasons
        finally:
            watch.stop()
            ray.shutdown()
    if failed:  # told last, after all that Ray has to say
        end(failed, 1)
    log.info("everything has ended")


@contextlib.contextmanager
def _serve(settings: Settings) -> Iterator[str]:
    """Runs Ray Serve within the block, unless it runs anyway; ends the application after it. Yields the API's URL.

    Raises:
        _FailedError: there is such an application already.
    """
    try:
        has_begun = not serve.status().proxies
    except RayServeException:
        has_begun = True
    if has_begun:
        options = {"host": settings.host, "port": settings.router.port}
        serve.start(proxy_location="EveryNode", http_options=options, logging_config=LOGGING)
    if APPLICATION in serve.status().applications:
        raise _FailedError(f"an application named {APPLICATION} runs on this cluster; end it first: serve shutdown")
    host, port = proxies.address()
    if not has_begun and (host, port) != (settings.host, settings.router.port):
        log.info("Ray Serve runs here already, and its proxies listen on port %d of %s", port, host)
    try:
        yield f"http://{bracketed(cluster.head_address() if host in LOOPBACK else host)}:{port}"
    finally:
        _end_streams()
        ending.end_application(settings)
        if has_begun and not serve.status().applications:
            serve.shutdown()


def _end_streams() -> None:
    """Has routers end what has no end of its own, so that their replicas need not wait for it."""
    try:
        serve.get_app_handle(APPLICATION).broadcast("end_streams").results(timeout_s=READY_SECONDS)
    except (RayServeException, TimeoutError, RayError) as error:  # they end without it, if later
        log.debug("streams go on: %s", error)


def _bring_up(settings: Settings, needs_key: bool, url: str, interrupts: _Interrupts) -> bool:
    """Starts the application and tells of its progress. Returns whether it is ready; it is not after a signal.

    Raises:
        _FailedError: it cannot be brought up.
    """
    seconds = settings.vllm.instance_timeout if settings.router.engine == "vllm" else settings.serve.start_timeout
    deadline = time.monotonic() + seconds
    # It is not waited for here. A thread that waits would go on after the end of Ray, and Ray would connect it to any
    # other cluster that it finds on this machine.
    target = serve.RunTarget(application(settings, needs_key=needs_key), name=APPLICATION)
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except Exception as error:
        raise _FailedError(f"Ray cannot start it: {error}") from error
    told: dict[str, str] = {}
    while not interrupts.count:
        time.sleep(POLL_SECONDS)
        states = _states()
        for name, (state, message) in states.items():
            known = state if not message or has_failed(message) else f"{state} - {cause(message)}"
            if told.get(name) != known:
                told[name] = known
                log.info("%s: %s", name, known)
        if (found := serve.status().applications.get(APPLICATION)) and found.status == ApplicationStatus.DEPLOY_FAILED:
            raise _FailedError(*(_causes(_states()) or [f"Ray cannot start it: {found.message}"]))
        if get(url, "/ready", READY_SECONDS)[0] == 200:
            return True
        if time.monotonic() > deadline:
            raise _FailedError(f"not ready within {seconds:g} s: {_in_words(states)}")
    return False


def _causes(states: dict[str, tuple[str, str]]) -> list[str]:
    """Returns one sentence for each cause, with all deployments that have it."""
    names: dict[str, list[str]] = {}
    for name, (_, message) in states.items():
        if has_failed(message):
            names.setdefault(cause(message), []).append(name)
    return [f"{' and '.join(names[why])} cannot start on Ray: {why}" for why in names]


def _in_words(states: dict[str, tuple[str, str]]) -> str:
    told = [f"{name}: {' - '.join(filter(None, (state, cause(why))))}" for name, (state, why) in states.items()]
    return "; ".join(told) or "Ray has started nothing yet"


def _states() -> dict[str, tuple[str, str]]:
    """Returns the state of each deployment in words, and what Serve says about it."""
    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return {}
    found = {}
    for name, one in application.deployments.items():
        counts = ", ".join(f"{count} {state.lower()}" for state, count in one.replica_states.items() if count)
        found[name] = counts or "nothing runs", one.message
    return found


class _Interrupts:
    """The handler of SIGINT and SIGTERM. The second one ends the process, and a cluster that it has started.

    Args:
        watch: of that cluster.

    Attributes:
        count: the signals so far.
    """

    def __init__(self, watch: RayWatch) -> None:
        self.count = 0
        self._watch = watch

    def __call__(self) -> None:
        self.count += 1
        if self.count > 1:
            self._watch.stop()
            ray.shutdown()
            os._exit(KILLED)
