"""Every 503 that the code can give says when to ask again, and agrees with docs/errors.md on whether to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import embferry
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.server_limits import ServerLimits
from embferry.engine import errors as _engine_errors  # noqa: F401  (its classes are found below)
from embferry.protocol.errors import EmbferryError
from embferry.serve.errors import CODES, ServeError
from embferry.serve.http import errors as router_errors
from embferry.serve.worker import errors as worker_errors
from embferry.trust import Trust
from tests.strangers.raw_http import request, send, status_of

SOURCE = Path(embferry.__file__).parent
ERRORS_PAGE = SOURCE.parents[1] / "docs" / "errors.md"

RAISED = {
    "protocol/errors.py CapacityError", "protocol/errors.py PeerGone", "engine/errors.py QueueFull",
    "serve/errors.py ", "serve/byte_budget.py _full", "serve/media/checks.py exhausted",
    "serve/http/connections.py BoundedProtocol.cut_off",
    "serve/media/decoding/child.py Child._wait_until_ready", "serve/media/decoding/pool.py DecoderPool._started",
    "serve/vllm/failover.py Failover.fail", "serve/http/watching.py Watching.watch",
}  # fmt: skip
"""Errors with status 503, which become responses in the two functions tested below."""
ANSWERED = {
    "discovery/bootstrap_server.py BootstrapServer._put_worker", "discovery/http_server.py HttpServer.evict",
    "serve/http/status.py status_routes.ready", "serve/worker/http.py worker_app.report",
    "connectors/sglang/inside/encoder_http.py describe",
}  # fmt: skip
"""Responses of their own. Those of the bootstrap server are tested below, the others here by what they call."""
OF_SGLANG = {"connectors/sglang/dispatcher.py ", "connectors/sglang/inside/waiting.py status_of"}
"""Statuses that SGLang's own server makes a response of."""
READ = {
    "discovery/bootstrap_client.py BootstrapClient._refused", "discovery/http_client.py _exchange",
    "serve/errors.py is_retryable", "serve/http/errors.py retry_after", "serve/router/worker_call.py WorkerCall._first",
    "serve/http/chat.py ChatEndpoint._fail", "serve/http/edge.py Edge._note",
    "serve/vllm/failures.py is_busy",
}  # fmt: skip
"""Places that read the status: of another server, or for the log."""


def places() -> Iterator[tuple[str, ast.AST]]:
    """Yields each place of the source that names the status, with the function around it."""

    def visit(node: ast.AST, path: str, names: list[str], around: ast.AST) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from visit(child, path, [*names, child.name], child)
                continue
            is_status = isinstance(child, ast.Constant) and child.value == 503 and child.value is not True
            if is_status or (isinstance(child, ast.Attribute) and child.attr == "SERVICE_UNAVAILABLE"):
                yield f"{path} {'.'.join(names)}", around
            yield from visit(child, path, names, around)

    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        yield from visit(tree, file.relative_to(SOURCE).as_posix(), [], tree)


def test_every_503_of_the_source_is_known() -> None:
    assert {name for name, _ in places()} == RAISED | ANSWERED | OF_SGLANG | READ


def test_every_response_of_its_own_has_the_header() -> None:
    for name, function in places():
        if name in ANSWERED:
            assert re.search(r"retry_after\(|Retry-After", ast.unparse(function)), name


def subclasses(kind: type[EmbferryError]) -> Iterator[type[EmbferryError]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def documented() -> dict[str, bool]:
    """Returns whether to retry, by the codes of docs/errors.md with status 503."""
    rows = re.findall(r"^\| `(\w+)` \| 503 \| (yes|no) \|", ERRORS_PAGE.read_text(), re.M)
    return {code: retry == "yes" for code, retry in rows}


def errors() -> dict[str, EmbferryError]:
    """Returns an error of each kind with status 503, by its code."""
    found: dict[str, EmbferryError] = {}
    for kind in subclasses(EmbferryError):
        if kind.__module__.startswith("embferry.") and getattr(kind, "http_status", None) == 503:
            found[kind.code] = kind("x")
    return found | {code: ServeError(code, "x") for code, (status, _) in CODES.items() if status == 503}


def test_errors_and_documentation_agree() -> None:
    assert {code: error.retryable for code, error in errors().items()} == documented()


@pytest.mark.parametrize("code", sorted(errors()))
def test_responses_of_routers_and_workers_say_when_and_whether(code: str) -> None:
    error = worker_errors.as_serve_error(errors()[code])
    answer = router_errors.error_response(error)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == ("true" if documented()[code] else "false")
    assert int(worker_errors.error_response(error).headers["retry-after"]) >= 1


@pytest.mark.integration
def test_responses_of_the_bootstrap_server_say_when() -> None:
    with BootstrapServer(trust=Trust(), max_workers=1, limits=ServerLimits(connections_per_address=1)) as server:
        at = server.host, server.port
        for number in range(2):
            body = b'{"id":"w%d","role":"encode","url":"http://h:1","endpoint":"tcp://h:2"}' % number
            answer = send(at, request("PUT", f"/workers/w{number}", body), shuts=False)
        assert status_of(answer) == 503
        assert re.search(rb"\r\nretry-after: [1-9]", answer.lower())
