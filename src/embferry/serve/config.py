"""Every setting of every process: names, types, units, defaults and help, once.

The command line, the environment, the YAML file and ``docs/configuration.md`` are all derived from these models. A
setting ``num_blocks`` of section ``transfer`` is ``transfer.num_blocks`` in the file, ``EMBFERRY_TRANSFER_NUM_BLOCKS``
in the environment and ``--transfer-num-blocks`` on the command line. All processes of a deployment can share one file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_core import PydanticCustomError

from embferry.serve.config_transports import AUTO, known_transport, transports_once

MIB = 1 << 20


def _split(value: Any) -> Any:
    """A list may be written as ``a,b`` where only a string fits: on the command line and in the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _without_parameters(value: Any) -> Any:
    """Names alone do where parameters by name are wanted."""
    names = _split(value)
    return {name: {} for name in names} if isinstance(names, list | tuple) else names


def _base_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise PydanticCustomError("url", "a base URL is such as http://10.0.0.2:8001")
    return text


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Urls = Annotated[tuple[Annotated[str, AfterValidator(_base_url)], ...], BeforeValidator(_split)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(_split)]
TransportName = Annotated[str, AfterValidator(known_transport)]
Transports = Annotated[
    tuple[TransportName, ...], BeforeValidator(_split), AfterValidator(transports_once), Field(min_length=1)
]
Parameter = Annotated[str, Field(coerce_numbers_to_str=True)]
METADATA_SERVER = r"^(P2PHANDSHAKE|(https?|etcd|redis)://\S+)$"
"""With anything else the engine ends the process."""
Backends = Annotated[dict[str, dict[str, Parameter]], BeforeValidator(_without_parameters), Field(min_length=1)]


class Section(BaseModel):
    """What all sections have in common: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class TransferSettings(Section):
    """How embeddings cross from encode to language workers."""

    transports: Transports = (AUTO,)
    """Transports for the bytes, the preferred one first: `shm`, `nixl`, `mooncake`, `tcp`, `http`. The encode worker takes
    the first of its own that the language worker has too, and the next one if that fails. `auto`: those of this list,
    in this order, whose engine is installed; where `host` or `advertise_host` is a loopback address, so that all peers
    are on this machine, `shm` and `tcp`."""
    mooncake_protocol: str = "tcp"
    """What the Mooncake engine moves bytes with: `tcp`, `rdma`, or what your build has. The same on both sides."""
    mooncake_device: str = ""
    """RDMA devices the Mooncake engine uses, comma separated. All by default."""
    mooncake_metadata_server: Annotated[str, Field(pattern=METADATA_SERVER)] = "P2PHANDSHAKE"
    """Where Mooncake engines find each other: `P2PHANDSHAKE`, which needs no server, or `http://host:port/metadata`.
    The same on both sides."""
    nixl_backends: Backends = {"UCX": {}}
    """Backends of NIXL; both sides need one in common. In the file with NIXL's parameters, if you like: `{UCX:
    {num_workers: 2}}`."""
    http_port: Port = 0
    """TCP port at which an encode worker offers embeddings on the `http` transport; 0 takes a free one."""
    http_advertise: str | None = None
    """Where language workers find that port, if not at `advertise_host`: an IP address, or the URL of a proxy in front
    of it, such as `http://192.0.2.1:8080/path`."""
    http_proxy: str | None = None
    """A forward proxy through which a language worker fetches, such as `http://192.0.2.1:3128`."""
    num_blocks: Positive = 64
    """Blocks in the receive pool of a language worker. One is enough for any embedding; more is faster."""
    block_size: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    """Tokens a block."""
    default_allocate_tokens: Positive = 8192
    """Tokens to allocate for an embedding whose length is not known yet."""
    bootstrap_timeout: Seconds = 30
    """Seconds the two sides may take to find each other."""
    waiting_timeout: Seconds = 120
    """Seconds between the announcement of an embedding and its first token: the encoder's time."""
    transfer_timeout: Seconds = 30
    """Seconds without any progress after which a running transfer fails."""
    drain_timeout: Seconds = 2
    """Seconds a sender may take to say that it is done with blocks that are wanted back; then its access is revoked."""
    heartbeat_interval: Seconds = 1
    """Seconds between two signs of life of a peer."""
    heartbeat_max_failures: Positive = 5
    """Signs of life a peer may miss in a row before it counts as gone."""


class MediaSettings(Section):
    """What pictures and videos are accepted. The router and the encode workers both check."""

    allowed_hosts: Names = ()
    """Hosts pictures may be fetched from: `host`, `host:port`, `*.domain` or `*`. Only a host named in full may have a
    private address. None by default."""
    allowed_folders: Folders = ()
    """Folders `file:` URLs may point into. None by default."""
    max_bytes: Positive = 32 * MIB
    """Bytes of one picture or video file."""
    max_total_bytes: Positive = 128 * MIB
    """Bytes of all pictures and videos of a request."""
    max_images: Positive = 16
    """Pictures in a request, frames of videos not counted."""
    max_videos: Positive = 2
    """Videos in a request."""
    max_pixels: Positive = 64_000_000
    """Pixels of a picture, read from its header before any is decoded."""
    max_side: Positive = 32_768
    """Pixels of the longer side of a picture or video."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 200
    """Longer over shorter side of a picture or video."""
    video_fps: Annotated[float, Field(gt=0, le=240)] = 2
    """Frames taken from a second of a video file."""
    max_video_frames: Positive = 768
    """Frames taken from a video file; of a longer one, that many evenly spread. Also the most frames of a list."""
    max_video_pixels: Positive = 500_000_000
    """Pixels of all frames taken from a video together; each needs 3 bytes of memory."""
    max_video_seconds: Seconds = 3600
    """Seconds a video file may last."""
    fetch_timeout: Seconds = 10
    """Seconds fetching one picture or video may take in all."""


class EncodeSettings(Section):
    """Encode workers: pictures and videos in, embeddings out."""

    port: Port = 0
    """TCP port of the HTTP server; 0 takes a free one."""
    cache_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Bytes of embeddings kept for pictures that come again; 0 keeps none."""
    max_rooms: Positive = 1024
    """Requests with embeddings not yet delivered; further ones are refused with 503."""
    unclaimed_timeout: Seconds = 60
    """Seconds an embedding waits for a language worker to ask for it."""


class LanguageSettings(Section):
    """Language workers: prompts and embeddings in, text out."""

    port: Port = 0
    """TCP port of the HTTP server; 0 takes a free one."""
    max_concurrent: Positive = 8
    """Requests that generate at the same time."""
    max_queued: Positive = 1024
    """Requests that wait for their turn; further ones are refused with 503."""
    max_prompt_tokens: Positive = 131_072
    """Tokens of a prompt, embeddings included. The model's own limit holds too."""
    prefill_chunk_tokens: Positive = 512
    """Tokens of a prefill step. Decides how results are rounded, so compare like with like."""
    max_new_tokens: Positive = 1024
    """Tokens an answer may have at most."""


class RouterSettings(Section):
    """The router: the OpenAI-compatible HTTP API in front."""

    port: Port = 8000
    """TCP port of the HTTP server."""
    engine: Literal["embferry", "vllm"] = "embferry"
    """What computes behind the router: workers of this project, or instances of vLLM (the settings of `vllm`)."""
    served_model_name: str | None = None
    """Name of the model in the API; the last part of `model` if unset."""
    api_key: SecretStr | None = None
    """If set, requests must carry it as `Authorization: Bearer …`."""
    default_max_tokens: Positive = 128
    """Tokens an answer may have when the request does not say."""
    max_body_bytes: Positive = 192 * MIB
    """Bytes of a request body."""
    request_timeout: Seconds = 300
    """Seconds a request may take in all; then 504."""
    connect_timeout: Seconds = 3
    """Seconds a worker may take to accept a connection."""
    poll_interval: Seconds = 1
    """Seconds between two looks at the list of workers."""


class BootstrapSettings(Section):
    """The bootstrap server: who is where."""

    port: Port = 8998
    """TCP port of the HTTP server."""
    lease: Seconds = 5
    """Seconds after which a worker that has not renewed its lease is forgotten."""


class ServeSettings(Section):
    """`embferry serve`: all processes on one machine."""

    encode_workers: Positive = 1
    """Encode workers to start."""
    language_workers: Positive = 1
    """Language workers to start."""
    restart_delay: Seconds = 1
    """Seconds before a worker that died is started again; doubled each time, up to 30."""
    start_timeout: Seconds = 120
    """Seconds until everything must be ready."""
    stop_timeout: Seconds = 10
    """Seconds a process may take to end before it is killed."""


class VllmSettings(Section):
    """With `router.engine: vllm`: the instances of vLLM behind the router, and what `embferry serve` starts."""

    encode_urls: Urls = ()
    """Base URLs of the instances that encode (`ec_producer`), such as `http://10.0.0.2:8001`."""
    language_urls: Urls = ()
    """Base URLs of the instances that answer (`ec_consumer`)."""
    connector: Literal["embferry", "example", "mooncake"] = "embferry"
    """The EC connector the instances run: this project's, or one of vLLM's own (`ECExampleConnector`,
    `ECMooncakeConnector`)."""
    consumer_zmq: Names = ()
    """With `connector: mooncake`: the control address of each instance in `language_urls`, in the same order, such as
    `tcp://10.0.0.3:14750`."""
    language_encodes: bool = False
    """When nobody else can encode, or the transfer has failed for good before anything was answered, send the request
    undivided to an instance that answers: it encodes by itself."""
    encode_timeout: Seconds = 60
    """Seconds an instance may take to encode one item; then another one is asked."""
    affinity_slack: Annotated[int, Field(ge=0)] = 4
    """An item goes where it was encoded before, unless that instance has this many more in hand than the idlest one."""
    received_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """What an instance that answers keeps of the embeddings it has received (`cache_bytes` of its connector): an item
    that it should still have is not encoded again. With 0, every item of every request is."""
    replacements_per_item: Annotated[int, Field(ge=0)] = 3
    """How often an item may be encoded again elsewhere while its transfer is under way."""
    encoders: Positive = 1
    """`embferry serve`: instances that encode."""
    languages: Positive = 1
    """`embferry serve`: instances that answer."""
    transports: Annotated[tuple[TransportName, ...], BeforeValidator(_split), AfterValidator(transports_once)] = (
        "shm",
        "tcp",
    )
    """`embferry serve`: transports for the embeddings, the preferred one first."""
    instance_timeout: Seconds = 600
    """`embferry serve`: seconds until every instance must answer."""


class Settings(Section):
    """Everything. The settings here at the top hold for every process; each section is named after its process."""

    model: str = "shapes"
    """A packaged model's name, or a local directory in the Hugging Face layout."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format the model computes in."""
    threads: Positive = 1
    """CPU threads a worker computes with. Decides how results are rounded."""
    host: str = "127.0.0.1"
    """Address servers listen on."""
    advertise_host: str | None = None
    """Address other machines reach this one by; `host` if unset. Needed when `host` is `0.0.0.0`."""
    bootstrap_url: str = "http://127.0.0.1:8998"
    """Where the bootstrap server answers."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""
    log_format: Literal["plain", "json"] = "plain"
    """`json` writes one object a line."""

    transfer: TransferSettings = TransferSettings()
    media: MediaSettings = MediaSettings()
    encode: EncodeSettings = EncodeSettings()
    language: LanguageSettings = LanguageSettings()
    router: RouterSettings = RouterSettings()
    bootstrap: BootstrapSettings = BootstrapSettings()
    serve: ServeSettings = ServeSettings()
    vllm: VllmSettings = VllmSettings()

    @property
    def model_name(self) -> str:
        """The model's name without its directory; what workers register under."""
        return Path(self.model).name

    @property
    def public_model_name(self) -> str:
        """The model's name in the HTTP API."""
        return self.router.served_model_name or self.model_name

    @property
    def reachable_host(self) -> str:
        """What to put into URLs given to other machines."""
        return self.advertise_host or self.host


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
