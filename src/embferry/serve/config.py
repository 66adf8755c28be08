"""Every setting of every process: name, type, unit, default and description.

The command line, the environment, the YAML file and ``docs/configuration.md`` all derive from these models. The setting
``num_blocks`` of section ``transfer`` is ``transfer.num_blocks`` in the file, ``EMBFERRY_TRANSFER_NUM_BLOCKS`` in the
environment and ``--transfer-num-blocks`` on the command line. All processes of a deployment can share one file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    field_validator,
)
from pydantic_core import PydanticCustomError

from embferry.serve.config_base import Port, Positive, Seconds, Section
from embferry.serve.config_ray import RaySettings
from embferry.serve.config_values import (
    AddressOrUrl,
    CacheUrl,
    Folders,
    Host,
    MediaHosts,
    Origins,
    ProxyUrl,
    ServerUrl,
    TracesUrl,
    Urls,
    ZmqUrls,
    api_key,
    split,
)
from embferry.transports.registry import TRANSPORTS

MIB = 1 << 20
AUTO = "auto"
"""Value of the setting ``transports``: every transport that works here, in the registry's order."""
CHARACTERS_PER_TOKEN = 16
"""Characters of a text for each token that fits: several times as many as languages and programs need."""
LEAST_FPS, MOST_FPS = 0.001, 240
"""Frames of a video per second. The times of frames stand in prompts, and in positions, which have 24 bits."""
SAME_HOST = ("shm", "tcp")
"""The transports that AUTO selects when every peer runs on this host."""


def _without_parameters(value: Any) -> Any:
    """Accepts a list of names in place of a mapping from names to parameters."""
    names = split(value)
    return {name: {} for name in names} if isinstance(names, list | tuple) else names


def _known_transport(name: str) -> str:
    if name != AUTO and name not in TRANSPORTS:
        names = ", ".join((AUTO, *TRANSPORTS))
        raise PydanticCustomError("transport", "unknown transport; choose from {names}", {"names": names})
    return name


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("transports", "a transport is listed twice")
    if AUTO in names and len(names) > 1:
        raise PydanticCustomError("transports", "auto must stand alone: it selects all transports and their order")
    return names


Rate = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
TransportName = Annotated[str, AfterValidator(_known_transport)]
Transports = Annotated[
    tuple[TransportName, ...], BeforeValidator(split), AfterValidator(_each_once), Field(min_length=1)
]
Parameter = Annotated[str, Field(coerce_numbers_to_str=True)]
METADATA_SERVER = r"^(P2PHANDSHAKE|(https?|etcd|redis)://\S+)$"
"""The values that Mooncake accepts; with any other its engine ends the process."""
Backends = Annotated[dict[str, dict[str, Parameter]], BeforeValidator(_without_parameters), Field(min_length=1)]


class TransferSettings(Section):
    """Transfer of embeddings from encode workers to language workers."""

    transports: Transports = (AUTO,)
    """Transports for the embeddings, the preferred one first: `shm`, `nixl`, `mooncake`, `tcp`, `http`. An encode
    worker uses the first of its own that the language worker has too, and the next one if that fails. `auto` selects
    all of them whose engine is installed, in this order; if the advertised address is a loopback address, all peers are
    on this machine, and `auto` selects `shm` and `tcp`."""
    mooncake_protocol: str = "tcp"
    """Network protocol of the Mooncake engine: `tcp`, `rdma`, or another that your build has. Must be the same on both
    sides."""
    mooncake_device: str = ""
    """RDMA devices of the Mooncake engine, comma separated. Empty: all devices."""
    mooncake_metadata_server: Annotated[str, Field(pattern=METADATA_SERVER)] = "P2PHANDSHAKE"
    """Metadata server of the Mooncake engines: `P2PHANDSHAKE`, which needs no server, or `http://host:port/metadata`.
    Must be the same on both sides."""
    nixl_backends: Backends = {"UCX": {}}
    """NIXL backends; both sides need one in common. The file may add parameters of NIXL: `{UCX: {num_workers: 2}}`."""
    http_port: Port = 0
    """TCP port of an encode worker for the `http` transport; 0 takes a free one."""
    http_advertise: AddressOrUrl | None = None
    """Address of that port for language workers: an IP address, or the URL of a proxy in front of it, such as
    `http://192.0.2.1:8080/path`. `advertise_host` if unset."""
    http_proxy: ProxyUrl | None = None
    """Forward proxy of language workers for the `http` transport, such as `http://192.0.2.1:3128`."""
    num_blocks: Positive = 64
    """Blocks in the receive pool of a language worker. One is enough for any embedding; more are faster."""
    block_size: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    """Tokens per block."""
    default_allocate_tokens: Positive = 8192
    """Tokens to allocate for an embedding whose length is not known yet."""
    bootstrap_timeout: Seconds = 30
    """Seconds within which the two sides must find each other."""
    waiting_timeout: Seconds = 120
    """Seconds from the announcement of an embedding to its first token, for the vision encoder."""
    transfer_timeout: Seconds = 30
    """Seconds without progress after which a running transfer fails. Bytes that come in slowly are progress."""
    stall_timeout: Seconds = 5
    """Seconds without progress on a data connection after which the transfer goes on over the next transport. A slow
    connection makes progress. Must be the same on both sides."""
    max_connections: Positive = 1024
    """Data connections that a worker accepts for each of `tcp`, `http`, `mooncake` and `nixl` (of this 256 at most);
    from one address, a quarter of them. Idle ones make room for others. It is lowered to an eighth of the process's
    limit of descriptors (`ulimit -n`)."""
    drain_timeout: Seconds = 2
    """Seconds within which a sender must confirm that it no longer writes to blocks that are being reclaimed; then its
    access is revoked."""
    heartbeat_interval: Seconds = 1
    """Seconds between two heartbeats of a peer."""
    heartbeat_max_failures: Positive = 5
    """Heartbeats a peer may miss in a row before it counts as gone."""
    answer_timeout: Seconds = 5
    """Seconds of silence after which an encode worker that has offered nothing yet counts as gone. One that answers has
    `bootstrap_timeout`."""
    max_embedding_bytes: Positive | None = None
    """Bytes of the largest embedding that a language worker accepts; it refuses a longer one before it asks for any
    memory. If unset, 16 GiB or the machine's memory, whichever is less."""
    parked_requests: Positive = 1024
    """Requests of language workers that an encode worker keeps for embeddings not announced yet. The oldest makes room
    for the newest, and its language worker asks again."""
    parked_bytes: Positive = 16 * MIB
    """Bytes of such requests."""
    control_connections: Positive = 1024
    """Connections of language workers that an encode worker accepts for control messages, at most a quarter of the
    process's limit on open files."""
    control_connections_per_address: Positive = 256
    """Connections for control messages from one IPv4 address, or from one IPv6 network of 64 bits."""
    control_unsent_bytes: Positive = 64 * MIB
    """Bytes of control messages that wait to be sent. Those beyond are dropped, and repeated later."""
    control_unsent_bytes_per_peer: Positive = 4 * MIB
    """Bytes of control messages that wait to be sent to one peer."""
    control_connect_timeout: Seconds = 5
    """Seconds for which a peer that cannot be reached is tried again before it counts as gone."""


class MediaSettings(Section):
    """Limits on pictures and videos. The router and the encode workers both check them."""

    allowed_hosts: MediaHosts = ()
    """Hosts from which media may be fetched: `host`, `host:port`, `*.domain` or `*`. Only a host listed by its full
    name may have a private address. None by default."""
    allowed_folders: Folders = ()
    """Folders that `file:` URLs may point into. None by default."""
    max_bytes: Positive = 32 * MIB
    """Bytes of one file."""
    max_total_bytes: Positive = 128 * MIB
    """Bytes of all files of a request."""
    max_images: Positive = 16
    """Pictures in a request, without the frames of videos; before vLLM, as many sounds beside them."""
    max_videos: Positive = 2
    """Videos in a request."""
    max_pixels: Positive = 64_000_000
    """Pixels of a picture. Checked in the header, before anything is decoded. The scans of a progressive JPEG may pass
    over 20 times as many."""
    max_side: Positive = 32_768
    """Pixels of the longer side of a picture or video."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 200
    """Ratio of the longer to the shorter side of a picture or video."""
    video_fps: Annotated[float, Field(ge=LEAST_FPS, le=MOST_FPS)] = 2
    """Frames sampled per second of a video file."""
    max_video_frames: Positive = 768
    """Frames sampled from a video file; a longer video is sampled more sparsely. Also the limit of a list of frames."""
    max_video_pixels: Positive = 500_000_000
    """Pixels of all sampled frames of a video together; each needs 3 bytes of memory."""
    max_video_seconds: Seconds = 3600
    """Duration of a video file in seconds."""
    fetch_timeout: Seconds = 10
    """Seconds to fetch one file."""
    decode_memory: Positive = 2048 * MIB
    """Bytes of memory for decoding one picture or video. Files are decoded in processes of their own."""
    image_decode_timeout: Seconds = 10
    """Seconds of processor time for decoding a picture; by the clock, four times as many."""
    video_decode_timeout: Seconds = 60
    """Seconds of processor time for decoding a video or a list of frames; by the clock, four times as many."""


class EncodeSettings(Section):
    """Encode workers: pictures and videos in, embeddings out."""

    port: Port = 0
    """TCP port of the HTTP server; 0 takes a free one."""
    cache_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Bytes of embeddings cached for media that are sent again; 0 caches none."""
    max_rooms: Positive = 1024
    """Requests whose embeddings are not yet delivered; more are refused with 503."""
    max_held_bytes: Positive | None = None
    """Bytes of media, decoded pictures and embeddings held for such requests; more are refused with 503. A larger
    request is accepted when there is no other. A quarter of the machine's memory if unset."""
    unclaimed_timeout: Seconds = 60
    """Seconds an embedding waits for a language worker to open the transfer."""
    unclaimed_grace: Seconds = 5
    """Seconds after which such an embedding makes room for a new request when `encode.max_rooms` or
    `encode.max_held_bytes` is reached. Sooner if its caller (by IP address) has more of them than the new one's."""


class CacheSettings(Section):
    """The cache that encoders share: encode workers, or the instances of vLLM that `embferry serve` starts."""

    url: CacheUrl | None = None
    """Where embeddings are kept for all encoders, and beyond their end: a folder, `file:///var/cache/embferry`, or a
    Mooncake store, `mooncake://10.0.0.1:50051`. `--cache URL` says the same. None by default."""
    max_bytes: Positive = 10 * 1024 * MIB
    """Bytes of the folder. The least recently used embeddings make room for new ones. A Mooncake store has bounds of
    its own."""
    lookup_timeout: Seconds = 1
    """Seconds for which a request waits for a lookup; then its item is encoded."""


class LanguageSettings(Section):
    """Language workers: prompts and embeddings in, text out."""

    port: Port = 0
    """TCP port of the HTTP server; 0 takes a free one."""
    max_concurrent: Positive = 8
    """Requests that generate at the same time."""
    max_queued: Positive = 1024
    """Requests that wait for their turn; more are refused with 503."""
    max_held_bytes: Positive | None = None
    """Bytes of prompts and embeddings held for requests; more are refused with 503. A larger request is accepted when
    there is no other. A quarter of the machine's memory if unset."""
    max_prompt_tokens: Positive = 131_072
    """Tokens of a prompt, embeddings included. The model's own limit applies too."""
    max_prompt_characters: Positive | None = None
    """Characters of all texts of a request; longer ones are refused before they are tokenized. 16 for each of
    `max_prompt_tokens`, or of the tokens that the model takes, if unset. A router before vLLM checks it too."""
    prefill_chunk_tokens: Positive = 512
    """Tokens of a prefill step. Affects rounding: compare results only at the same value."""
    max_new_tokens: Positive = 1024
    """Tokens of an answer."""
    kept_folder: Path | None = None
    """Folder in memory, such as `/dev/shm/embferry`, that the language workers of a deployment on one host share.
    Embeddings lie there while they arrive; what has arrived at a worker that is killed need not be sent again.
    `embferry serve` makes a folder of its own if unset; other workers then use ordinary memory."""
    kept_bytes: Annotated[int, Field(ge=0)] = 1024 * MIB
    """Bytes there of embeddings whose worker was killed; the least recently used make room for others. 0: embeddings
    arrive in ordinary memory."""

    @property
    def prompt_characters(self) -> int:
        """The most characters that the texts of a request may have."""
        return self.max_prompt_characters or CHARACTERS_PER_TOKEN * self.max_prompt_tokens


class RouterSettings(Section):
    """The router, which serves the OpenAI-compatible HTTP API."""

    port: Port = 8000
    """TCP port of the API; 0 takes a free one."""
    engine: Literal["embferry", "vllm"] = "embferry"
    """The engine behind the router: workers of this project, or instances of vLLM (section `vllm`)."""
    served_model_name: str | None = None
    """Name of the model in the API; the last part of `model` if unset."""
    api_key: SecretStr | None = None
    """If set, requests must carry it, or a key of `router.api_keys_file`, as `Authorization: Bearer …`. It is refused
    on the command line, which every user of the machine can read."""
    api_keys_file: Path | None = None
    """File with the names and hashes of API keys, one a line, each with limits of its own; `embferry keys api new` adds
    one. If set, requests must carry one of the keys. The file is read again when it changes."""
    client_requests: Positive = 512
    """Requests under `/v1/` that one client may have at once; more are refused with 429. A client is an API key, or
    without keys an IPv4 address or an IPv6 network of 64 bits. A key's own limits go before these."""
    client_requests_per_second: Rate = 1000
    """Requests a second of one client, on average over two seconds."""
    client_bytes_per_second: Rate = 256 * MIB
    """Bytes a second of the request bodies of one client, on average. A client that has sent more waits before its next
    request."""
    default_max_tokens: Positive | None = None
    """Tokens of an answer if the request sets no limit; as many as fit after the prompt, and at most
    `language.max_new_tokens`, if unset."""
    cors_origins: Origins = ()
    """Origins of web pages that may ask the router from a browser, such as `https://chat.example.com`, or `*`. None by
    default."""
    max_body_bytes: Positive = 192 * MIB
    """Bytes of a request body."""
    max_held_bytes: Positive = 1024 * MIB
    """Bytes of request bodies and media held at the same time; more are refused with 503. A larger request is accepted
    when there is no other. Handling a body takes a few times its bytes of memory."""
    max_held_bytes_per_client: Positive = 512 * MIB
    """The same for one client. A larger request is accepted when the client has no other."""
    body_timeout: Seconds = 30
    """Seconds without a byte of a request body after which the request is refused with 408."""
    body_least_rate: Rate = 16 * 1024
    """Bytes a second at which a request body must arrive, on average after the first `router.body_timeout` seconds; a
    slower one is refused with 408. One with `Content-Length` must also be able to end within `router.request_timeout`.
    """
    request_timeout: Seconds = 300
    """Seconds a request may take in total; then it ends with 504."""
    connect_timeout: Seconds = 3
    """Seconds within which a worker must accept a connection, and the bootstrap server return the list of workers."""
    stall_timeout: Seconds = 5
    """Seconds of silence after which a worker counts as stalled. While it works, it gives a sign of life every second.
    An instance of vLLM must answer a probe within this time instead. The request goes to another worker or instance if
    its client has received nothing yet."""
    poll_interval: Seconds = 1
    """Seconds between two reads of the list of workers."""

    @field_validator("api_key")
    @classmethod
    def _key_can_be_sent(cls, key: SecretStr | None) -> SecretStr | None:
        return None if key is None else SecretStr(api_key(key.get_secret_value()))


class BootstrapSettings(Section):
    """The bootstrap server, where workers register."""

    port: Port = 8998
    """TCP port of the bootstrap server; 0 takes a free one."""
    lease: Seconds = 5
    """Seconds after which a worker that has not renewed its lease is removed."""
    request_timeout: Seconds = 5
    """Seconds for a whole request and its response; then the connection is closed."""
    max_connections: Positive = 1024
    """Connections at once, at most half of the files that the process may open. Another one takes the place of the
    oldest."""
    connections_per_address: Positive = 256
    """Connections at once of one IPv4 address, or of one IPv6 network of 64 bits. Another one takes the place of the
    oldest of them."""
    unproved_ranks: bool = False
    """Opens `/route` to ranks of the origin's system, which cannot prove the cluster key. Strangers can register ranks
    then, but see and change no worker."""


class TracesSettings(Section):
    """Traces of requests, sent to a collector of OpenTelemetry by router and workers. Needs `embferry[traces]`."""

    endpoint: TracesUrl | None = None
    """URL of the collector, which takes OTLP over HTTP, such as `http://127.0.0.1:4318`; without a path, `/v1/traces`
    is added. Without a URL there are no traces, and they cost nothing."""
    share: Annotated[float, Field(ge=0, le=1)] = 1
    """Share of the requests without a `traceparent` that are traced. Of one with it, its client has decided that."""


class ServeSettings(Section):
    """`embferry serve`: all processes on one machine, or on a Ray cluster."""

    runs_on: Literal["machine", "ray"] = "machine"
    """Where the processes run: on this machine, or on a Ray cluster (section `ray`), where Ray Serve starts, scales and
    restarts them. `--on ray` says the same."""
    encode_workers: Positive = 1
    """Encode workers to start."""
    language_workers: Positive = 1
    """Language workers to start."""
    restart_delay: Seconds = 1
    """Seconds before a worker that died is restarted; doubled each time, up to 30."""
    start_timeout: Seconds = 120
    """Seconds within which all processes must be ready."""
    stop_timeout: Seconds = 10
    """Seconds within which all processes must end, the bootstrap server last; then those that are left are killed."""


class VllmSettings(Section):
    """With `--engine vllm`: the instances behind the router, and those that `embferry serve` starts."""

    encode_urls: Urls = ()
    """Base URLs of the instances that encode (`ec_producer`), such as `http://10.0.0.2:8001`."""
    language_urls: Urls = ()
    """Base URLs of the instances that answer (`ec_consumer`)."""
    prefill_urls: Urls = ()
    """Base URLs of the instances that compute prompts (`ec_consumer` and `kv_producer`), with `decode_urls` in place of
    `language_urls`."""
    decode_urls: Urls = ()
    """Base URLs of the instances that compute answers (`ec_consumer` and `kv_consumer`)."""
    connector: Literal["embferry", "example", "mooncake"] = "embferry"
    """EC connector of the instances: this project's, or one of vLLM's own (`ECExampleConnector`,
    `ECMooncakeConnector`)."""
    consumer_zmq: ZmqUrls = ()
    """With `connector: mooncake`: the control address of each instance in `language_urls`, in the same order, such as
    `tcp://10.0.0.3:14750`."""
    connector_metrics_urls: Urls = ()
    """Base URLs of the metrics of the connectors (their `metrics_port`), such as `http://10.0.0.2:9101`, which `/sd`
    then names as well: one for each instance, in the order of `encode_urls`, `language_urls` or `prefill_urls`, and
    `decode_urls`."""
    language_encodes: bool = False
    """If no instance that encodes is left, or the transfer fails for good before the answer begins, send the whole
    request to an instance that answers, which then encodes by itself."""
    overlap: Literal["off", "pictures", "all"] = "pictures"
    """With `connector: embferry`: `pictures` asks the instance that answers while the pictures of a request are still
    being encoded, so that it prepares the prompt meanwhile. `all`: also where that instance has to decode the file
    itself, such as videos of Qwen2.5-VL; then a file that ends its decoder ends two instances at once."""
    encode_timeout: Seconds = 60
    """Seconds an instance may take to encode one item; then another instance is asked."""
    affinity_slack: Annotated[int, Field(ge=0)] = 4
    """An item goes to the instance that encoded it before, unless that instance has this many more items in progress
    than the least busy one."""
    received_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Bytes of received embeddings that an instance that answers keeps (`cache_bytes` of its connector). An item that
    it should still have is not encoded again; with 0, every item of every request is encoded."""
    uuid_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Bytes of files that the router keeps for clients that have given them a `uuid`, so that later requests can name
    them without sending them. The client that has most loses its least recently used ones first. 0 keeps none."""
    uuid_timeout: Seconds = 3600
    """Seconds after its last use for which such a file is kept."""
    failovers_per_item: Annotated[int, Field(ge=0)] = 3
    """How often an item may be encoded again by another instance during its transfer."""
    encoders: Positive = 1
    """`embferry serve`: instances that encode."""
    languages: Positive = 1
    """`embferry serve`: instances that answer."""
    prefills: Annotated[int, Field(ge=0)] = 0
    """`embferry serve`: instances that compute prompts, with `decodes` in place of `languages`. Keys and values travel
    over vLLM's `NixlConnector`, for which NIXL must be installed."""
    decodes: Annotated[int, Field(ge=0)] = 0
    """`embferry serve`: instances that compute answers."""
    transports: Annotated[tuple[TransportName, ...], BeforeValidator(split), AfterValidator(_each_once)] = (
        "shm",
        "tcp",
    )
    """`embferry serve`: transports for the embeddings, the preferred one first."""
    instance_timeout: Seconds = 600
    """`embferry serve`: seconds within which every instance must be ready."""


class SecuritySettings(Section):
    """Protection from strangers. The names go without `security` on the command line and in the environment."""

    cluster_key_file: Path | None = None
    """File of the cluster key, which every part proves to every other (`embferry keys new FILE`). It is read again when
    it changes. `EMBFERRY_CLUSTER_KEY` in the environment may hold the key itself instead."""
    insecure: bool = False
    """Listen where strangers can reach the process although it has no cluster key, or the router no API key: strangers
    can then use it, and read, replace and end the transfers of others."""
    unproved_requests_per_second: Rate = 200
    """Requests a second of one IPv4 address, or of one IPv6 network of 64 bits, that are answered without a proof of
    the cluster key, at each HTTP port, on average over two seconds; more are refused with 429. The API of a router is
    not among them. Without a cluster key, those of the own machine have no limit."""
    unproved_bytes_per_second: Rate = 64 * MIB
    """Bytes a second of the bodies of such requests."""
    tls_ca: Path | None = None
    """File of the certificate of the cluster's own CA (`embferry keys ca DIR`). With the next two, connections are
    encrypted. Of all three, a changed file is read again for new connections."""
    tls_cert: Path | None = None
    """File of the certificate of this part (`embferry keys cert`), for the host by which others reach it."""
    tls_key: Path | None = None
    """File of the private key of that certificate."""
    tls_required: bool = True
    """With a certificate, make and accept no connection without TLS. Off while a cluster changes over: both kinds are
    accepted then, but for the HTTP ports of router and workers, which stay without TLS."""
    tls_check_hosts: bool = True
    """With a certificate, accept a part that this one connects to only if its certificate is for the host by which it
    was reached. Off where addresses change all the time, as those of pods do: then any certificate of the CA will do,
    which must be the cluster's own. Clients check the router's host in any case."""


class Settings(Section):
    """All settings. Those at the top apply to every process; the sections are named after their processes."""

    model: str = "shapes"
    """Name of a packaged model, a local directory in the Hugging Face layout, or a name of the Hugging Face Hub such
    as `Qwen/Qwen2-VL-2B-Instruct`, which is downloaded once."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the model's computations."""
    threads: Positive = 1
    """CPU threads of a worker. Affects rounding."""
    wire: Literal["embferry", "origin"] = "embferry"
    """Protocol of an encode or language worker: our own, behind our router; or `origin`, that of SGLang's embedding
    transfer, behind its load balancer. `origin` needs the number format `bf16`."""
    host: Host = "127.0.0.1"
    """Address on which servers listen."""
    advertise_host: Host | None = None
    """Address by which other machines reach this one; `host` if unset. A worker needs it if `host` is `0.0.0.0`."""
    bootstrap_url: ServerUrl = "http://127.0.0.1:8998"
    """URL of the bootstrap server."""
    max_connections: Positive = 4096
    """Connections that the HTTP server of a router or worker keeps, at most 30 % of a router's limit on open files, and
    20 % of a worker's. A further one takes the place of the one that has been without a complete request longest, or
    is refused if all are being answered."""
    max_connections_per_address: Positive = 1024
    """The same for connections from one IPv4 address, or from one IPv6 network of 64 bits."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""
    log_format: Literal["plain", "json"] = "plain"
    """`json` writes one object per line."""

    transfer: TransferSettings = TransferSettings()
    media: MediaSettings = MediaSettings()
    encode: EncodeSettings = EncodeSettings()
    cache: CacheSettings = CacheSettings()
    language: LanguageSettings = LanguageSettings()
    router: RouterSettings = RouterSettings()
    bootstrap: BootstrapSettings = BootstrapSettings()
    serve: ServeSettings = ServeSettings()
    traces: TracesSettings = TracesSettings()
    vllm: VllmSettings = VllmSettings()
    ray: RaySettings = RaySettings()
    security: SecuritySettings = SecuritySettings()

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def places(self) -> dict[str, str]:
        """Where the user has set each setting, by its dotted name: an option as it was typed, a variable, a line."""
        return self._places

    def with_places(self, places: dict[str, str]) -> Settings:
        """Returns the settings with these places."""
        placed = self.model_copy()
        placed._places = places
        return placed

    def place(self, *key: str) -> str:
        """Returns the name by which the user has set a setting or, if it was left alone, may set it: its option."""
        spoken = key[1:] if key[0] == "security" else key
        return self._places.get(".".join(key)) or "--" + "-".join(spoken).replace("_", "-")

    @property
    def model_name(self) -> str:
        """The model's name without its directory, under which workers register."""
        path = Path(self.model)
        return path.name if path.name not in ("", "..") else path.resolve().name  # of "." and ".."

    @property
    def public_model_name(self) -> str:
        """The model's name in the HTTP API."""
        return self.router.served_model_name or self.model_name

    @property
    def reachable_host(self) -> str:
        """The host in URLs that are given to other machines."""
        return self.advertise_host or self.host


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
