"""The kinds of values that settings have: hosts, URLs, lists. Each refuses what could never have an effect."""

from __future__ import annotations

import ipaddress
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from embferry.cache import address
from embferry.protocol.errors import LocalProtocolError

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PLAIN = (
    ("a valid tuple", "a list"),
    ("a valid list", "a list"),
    ("a valid dictionary", "an object"),
    ("an instance of dict", "an object"),
    ("Tuple should", "The list should"),
    ("List should", "The list should"),
    ("Dictionary should", "The object should"),
)
LEAST_AMOUNT = 1e-4
"""The least amount of a resource of Ray."""
_RAYS_OWN = {
    "CPU": "use router_cpus, encoder_cpus and language_cpus",
    "GPU": "use encoder_gpus and language_gpus",
    "memory": "leave it out",
    "object_store_memory": "leave it out",
    "bundle": "leave it out",
}
_UNSENDABLE = re.compile(r"[^\x20-\x7e]")
"""Characters that the head of a request cannot have in a key."""


def split(value: Any) -> Any:
    """Splits ``a,b``, the form of a list on the command line and in the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _wrong(why: str, instead: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("value", "{why}", {"why": why if instead is None else f"{why}; write {instead}"})


def plain_words(message: str) -> str:
    """Returns a message of pydantic in the words of JSON and YAML, which have lists and objects."""
    for python, plain in _PLAIN:
        message = message.replace(python, plain)
    return message


def api_key(text: str) -> str:
    """Returns an API key without the white space at its ends, such as the line break at the end of a file.

    Raises:
        PydanticCustomError: no client could send it. The message does not show it.
    """
    key = text.strip()
    if not key:
        raise _wrong("an API key has more than white space")
    if _UNSENDABLE.search(key):
        raise _wrong("an API key is one line of letters, digits and signs of ASCII, and this one is not")
    return key


def _is_host(text: str) -> bool:
    """Returns whether a text is a host name or an IP address, without brackets."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # No name ends in digits alone: that is an address with too few numbers, or too large ones.
        return _NAME.fullmatch(text) is not None and not text.rpartition(".")[2].isdigit()
    return True


def _parts(text: str) -> SplitResult | None:
    """Returns the parts of a URL whose host and port can be used; None for another text."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    return parts if text.isascii() and _is_host(parts.hostname or "") and port != 0 else None


def _host_in(text: str, *, with_port: bool) -> str | None:
    """Returns the host that a longer text names, such as a URL; None if it names none."""
    parts = _parts(text if "://" in text else f"//{text}")
    if parts is None or parts.hostname is None:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    is_usual = parts.port is None or parts.port == _DEFAULT_PORTS.get(parts.scheme)
    return host if is_usual or not with_port else f"{host}:{parts.port}"


def _bare(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _host(text: str) -> str:
    if not _is_host(_bare(text)):
        raise _wrong("not a host name or an IP address", _host_in(text, with_port=False))
    return text


def _media_host(text: str) -> str:
    text = text.strip()
    wild, _, rest = text.rpartition("*.")
    if text == "*" or (wild == "" and _is_host_with_port(rest)) or re.fullmatch(r"\*:\d+", text):
        return text
    raise _wrong("not host, host:port, *.domain or *", _host_in(text, with_port=True))


def _is_host_with_port(text: str) -> bool:
    text = re.sub(r"[^\x00-\x7f]", "x", text)  # international names are encoded where they are compared
    host, _, port = text.rpartition(":")
    return _is_host(_bare(text)) or (_is_host(_bare(host)) and port.isdigit() and 0 < int(port) < 65536)


def _url(text: str, example: str, schemes: str = "https?", *, has_path: bool = False) -> SplitResult:
    """Returns the parts of a URL without user, query and fragment."""
    path = r"(/[^\s?#]*)?" if has_path else "/?"
    parts = _parts(text) if re.fullmatch(rf"({schemes})://[^\s/?#@]+{path}", text) else None
    if parts is None:
        raise _wrong(f"not a URL such as {example}")
    return parts


def _checked(example: str, schemes: str = "https?", *, has_path: bool = False) -> Callable[[str], str]:
    def check(text: str) -> str:
        _url(text, example, schemes, has_path=has_path)
        return text

    return check


def _proxy(text: str) -> str:
    parts = _url(text, "http://192.0.2.1:3128", "http")
    try:
        ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        raise _wrong("the host of a proxy must be an IP address, as in http://192.0.2.1:3128") from None
    return text


def _address_or_url(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        _url(text, "http://192.0.2.1:8080/path, nor an IP address", has_path=True)
    return text


def _origin(text: str) -> str:
    if text in ("*", "null"):
        return text
    parts = _parts(text)
    if parts is None or not parts.scheme:
        raise _wrong("not an origin such as https://chat.example.com, or *")
    if (origin := f"{parts.scheme}://{_host_in(text, with_port=True)}") != text:
        raise _wrong("not an origin as browsers send it", origin)
    return text


def _folder(path: Path) -> Path:
    if re.match(r"[a-z]+:", str(path)):
        raise _wrong("not a folder", re.sub(r"^[a-z]+:/*", "/", str(path)))
    return path.expanduser()


def _cache_url(text: str) -> str:
    try:
        address.parse(text)
    except LocalProtocolError as error:
        raise _wrong(error.detail) from None
    return text


def _amounts(value: Any) -> Any:
    """Reads ``a:1,b:0.5``, the form of amounts by name on the command line and in the environment."""
    return dict(part.rpartition(":")[::2] for part in split(value)) if isinstance(value, str) else value


def _amount(number: float) -> float:
    if 0 < number < LEAST_AMOUNT:
        raise _wrong(f"Ray has no amounts between 0 and {LEAST_AMOUNT:g}")
    return number


def _gpus(number: float) -> float:
    if number > 1 and number % 1:
        raise _wrong("Ray gives whole GPUs, or a part of one", f"{math.ceil(number)}")
    return number


def _resource(name: str) -> str:
    if (instead := _RAYS_OWN.get(name)) is not None:
        raise _wrong(f"{name} is a resource of Ray's own, and none that you give to nodes; {instead}")
    return name


def _words(value: Any) -> Any:
    """Splits a text into words as a shell does."""
    try:
        return shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise _wrong(f"not words as a shell reads them ({error})") from None


CacheUrl = Annotated[str, AfterValidator(_cache_url)]
Host = Annotated[str, AfterValidator(_host)]
ServerUrl = Annotated[str, AfterValidator(_checked("http://10.0.0.1:8998"))]
TracesUrl = Annotated[str, AfterValidator(_checked("http://127.0.0.1:4318", has_path=True))]
ProxyUrl = Annotated[str, AfterValidator(_proxy)]
AddressOrUrl = Annotated[str, AfterValidator(_address_or_url)]
MediaHosts = Annotated[tuple[Annotated[str, AfterValidator(_media_host)], ...], BeforeValidator(split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(split)]
Urls = Annotated[
    tuple[Annotated[str, AfterValidator(_checked("http://10.0.0.2:8001", has_path=True))], ...], BeforeValidator(split)
]
ZmqUrls = Annotated[
    tuple[Annotated[str, AfterValidator(_checked("tcp://10.0.0.3:14750", "tcp"))], ...], BeforeValidator(split)
]
Folders = Annotated[tuple[Annotated[Path, AfterValidator(_folder)], ...], BeforeValidator(split)]
Amount = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False), AfterValidator(_amount)]
Gpus = Annotated[Amount, AfterValidator(_gpus)]
Resources = Annotated[
    dict[Annotated[str, Field(min_length=1), AfterValidator(_resource)], Annotated[Amount, Field(gt=0)]],
    BeforeValidator(_amounts),
]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
