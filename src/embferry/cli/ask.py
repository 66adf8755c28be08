"""``embferry ask IMAGE… "question"``: asks a running router and prints the answer as it arrives."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embferry.cli.ask_failures import about_key, no_router, reason, sentence
from embferry.cli.ask_files import MAX_BYTES, MAX_BYTES_ENV, Files
from embferry.cli.ask_words import base_url, content
from embferry.cli.options import fail, not_on_command_line, tell
from embferry.cli.wrapping import Wrapped, folded, width_of
from embferry.protocol.errors import TlsFailed
from embferry.serve.config import RouterSettings
from embferry.serve.config_load import env_name
from embferry.trust.tls import dialling_with
from embferry.trust.trust import TLS_ENV

if TYPE_CHECKING:
    from collections.abc import Sequence

    import httpx

DEFAULT_URL = f"http://127.0.0.1:{RouterSettings().port}"
MODELS_SECONDS = 30.0
"""Seconds for the list of models, which a router has at hand."""
DEFAULT_MAX_TOKENS = 512
"""Some pages of text. Without a bound, a small model that is asked something odd goes on for a minute."""


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[IMAGE|VIDEO]... QUESTION",
            help="Files or URLs, then the question. One of them may be -: standard input.",
        ),
    ],
    url: Annotated[
        str, typer.Option(help="The router's URL, with or without http:// and /v1.", metavar="URL")
    ] = DEFAULT_URL,
    model: Annotated[
        str, typer.Option(help="Model to ask; by default the one that the router serves.", metavar="NAME")
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the answer; 0 is the router's default.", metavar="TOKENS")
    ] = DEFAULT_MAX_TOKENS,
    max_bytes: Annotated[
        int,
        typer.Option(
            min=1, help="Longest file that is read; the router has a limit too.", metavar="BYTES", envvar=MAX_BYTES_ENV
        ),
    ] = MAX_BYTES,
    api_key: Annotated[
        str, typer.Option(hidden=True, envvar=env_name(("router", "api_key")), callback=not_on_command_line)
    ] = "",
    ca: Annotated[
        str,
        typer.Option(help="PEM file with the CA of a router at https://.", metavar="FILE", envvar=TLS_ENV[0]),
    ] = "",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also report the transfer of the embeddings.")
    ] = False,
) -> None:
    """Ask a question about pictures and videos. The router's API key is read from EMBFERRY_ROUTER_API_KEY."""
    import httpx

    url = base_url(url, "https" if ca else "http")
    parts = content(words, Files(max_bytes))
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(None, connect=5)
    try:
        verify = dialling_with(ca) if ca else True
        with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False, verify=verify) as client:
            body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
            body |= {"model": name} if (name := model or _served(client)) else {}
            body |= {"max_tokens": max_tokens} if max_tokens else {}
            body["messages"] = [{"role": "user", "content": parts}]
            extension = _answer(client, body, words[:-1])
    except TlsFailed as error:
        fail(error.detail)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(reason(url, error, ca), status=1)
    if verbose:
        typer.echo(folded(transfers(extension), width_of(sys.stderr)), err=True)


def transfers(extension: dict[str, Any]) -> str:
    """Returns one line about the transfer of an answer, from the answer's field ``embferry``."""
    if "transfer" not in extension:
        return "this server's answers do not report transfers; see its metrics"
    transfer = extension["transfer"]
    if not transfer:
        return "no transfer: the question was text only"
    tokens, size = transfer.get("total_tokens", 0), transfer.get("bytes", 0)
    initial, resumed = transfer.get("initial", 0), transfer.get("resumed", 0)
    counts = f"{initial} initial and {counted(resumed, 'resumed transfer')}"
    transport = transfer.get("transport", "an unknown transport")
    sizes = f"{counted(tokens, 'token')} ({counted(size, 'byte')})"
    return f"{sizes} in {counts} over {transport}, room {extension.get('room')}"


def counted(number: int, thing: str) -> str:
    """Returns a number with its thing: "1 token", "2,048 tokens", "2 retries"."""
    if number != 1:
        thing = f"{thing[:-1]}ies" if thing.endswith("ry") else f"{thing}s"
    return f"{number:,} {thing}"


def _served(client: httpx.Client) -> str:
    """Returns the first model that is served; "" if none is now, which the answer to the question explains."""
    response = client.get("/v1/models", timeout=MODELS_SECONDS)
    _check(response, ())
    try:
        return next((str(model["id"]) for model in response.json()["data"]), "")
    except (ValueError, KeyError, TypeError):
        fail(no_router(response), status=1)


def _answer(client: httpx.Client, body: dict[str, Any], media: Sequence[str]) -> dict[str, Any]:
    """Prints the answer as it arrives. Returns the field ``embferry`` of its last chunk."""
    extension: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    text, why_ended = Wrapped(), ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        _check(response, media)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            try:
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    text.end()
                    fail(sentence(chunk["error"], media) or "the answer broke off", status=1)
                for choice in chunk["choices"]:
                    text.write(choice["delta"].get("content") or "")
                    why_ended = choice.get("finish_reason") or why_ended
                extension, usage = chunk.get("embferry", extension), chunk.get("usage") or usage
            except (ValueError, LookupError, TypeError, AttributeError):
                text.end()
                fail(
                    f"the server at {client.base_url} is no router: its answer is not as OpenAI's API has it", status=1
                )
    text.end()
    if why_ended == "length":
        tell(_cut_off(body.get("max_tokens"), usage.get("completion_tokens")))
    elif why_ended != "stop":
        fail(f"the answer is not complete: the server ended it early ({why_ended or 'without a reason'})", status=1)
    return extension


def _cut_off(wanted: int | None, got: int | None) -> str:
    """Returns the note on an answer that was longer than its limit.

    Args:
        wanted: the limit in the request, if it had one.
        got: the tokens of the answer, if the server has counted them.
    """
    after = "" if got is None and wanted is None else f" after {counted(got or wanted or 0, 'token')}"
    if wanted is not None and (got is None or got >= wanted):
        return f"the answer has been cut off{after}; --max-tokens takes more"
    return f"the answer has been cut off{after}, which is all that the router or the model allows"


def _check(response: httpx.Response, media: Sequence[str]) -> None:
    """Ends the process with the router's error message unless the status is 200."""
    if response.status_code != 200:
        response.read()
        try:
            told = response.json()
        except ValueError:
            told = None
        if response.status_code == 401:
            fail(about_key(is_given="authorization" in response.request.headers), status=1)
        fail(sentence(told, media) or no_router(response), status=1)
