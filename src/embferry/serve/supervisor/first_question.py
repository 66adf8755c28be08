"""The first question to a deployment that is ready: two commands to paste, whose answer the packaged model knows."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import embferry.models
from embferry.serve.config import Settings
from embferry.trust.trust import TLS_ENV

PICTURE = Path(embferry.models.__file__).with_name("example.png")
"""A red circle and a blue square, of 213 bytes."""
QUESTION, ANSWER = "what colour is the circle?", "red"
KEY = "EMBFERRY_ROUTER_API_KEY"
MAX_TOKENS = 16


def ask_line(url: str) -> str:
    """Returns a command line that asks with ``embferry ask``."""
    return f"{_command()} ask {ask_options(url)} {shlex.quote(_short(PICTURE))} {shlex.quote(QUESTION)}"


def ask_options(url: str) -> str:
    """Returns the options with which ``embferry ask`` reaches the router at ``url``."""
    ca = _ca(url)
    return f"--url {url} --ca {shlex.quote(ca)}" if ca else f"--url {url}"


def curl_line(url: str, settings: Settings) -> str:
    """Returns a command line that asks with curl, and holds the picture itself. Its API key comes from the shell."""
    picture = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    body = {"model": settings.public_model_name, "max_tokens": MAX_TOKENS}
    body |= {"messages": [{"role": "user", "content": content}]}
    words = ["curl -sS", f"{url}/v1/chat/completions"]
    if ca := _ca(url):
        words.append(f"--cacert {shlex.quote(ca)}")
    if needs_key(settings):
        words.append(f'-H "Authorization: Bearer ${KEY}"')
    words += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(json.dumps(body, separators=(',', ':')))}"]
    return " ".join(words)


def needs_key(settings: Settings) -> bool:
    """Returns whether the router asks for an API key."""
    return settings.router.api_key is not None or settings.router.api_keys_file is not None


def _ca(url: str) -> str:
    return os.environ.get(TLS_ENV[0], "") if url.startswith("https:") else ""


def _command() -> str:
    """Returns the command as it can be typed here: it may be in an environment that is not on PATH."""
    own = Path(sys.argv[0])
    if own.name != "embferry" or not os.access(own, os.X_OK):
        return f"{shlex.quote(sys.executable)} -m embferry"
    on_path = shutil.which("embferry")
    return "embferry" if on_path is not None and os.path.samefile(on_path, own) else shlex.quote(_short(own))


def _short(path: Path) -> str:
    """Returns a path as seen from the working directory, if it lies in there."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
