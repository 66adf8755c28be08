"""Other ways to move an embedding, each run as its own users would, in the way that suits it best."""

from __future__ import annotations

import base64
import http.client
import mmap
import os
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from embferry.transports.leased.mooncake.engine import DEFAULTS
from embferry.transports.leased.nixl.agent import binding

from . import payloads
from .contract import End, Facts, Receiving, Sending, UnavailableError

with suppress(ModuleNotFoundError):  # candidates that need it are missing then
    from safetensors.numpy import load_file, save_file

EMPTY = np.empty(0, np.uint8)


# The limit of the machine: numpy.copyto inside the receiving process, which also takes the time; the other process
# only says when. The option ``to`` is ``private`` or ``shared`` memory that has been touched before, or a ``fresh``
# array, as a language worker has it that allocates for each request.


class CopySending(Sending):
    pass


class CopyReceiving(Receiving):
    def setup(self) -> None:
        self._source, self._fresh = payloads.make(self.job.size), self.job.options["to"] == "fresh"
        if self.job.options["to"] == "shared":
            self.tensor = np.frombuffer(mmap.mmap(-1, self.job.size), np.uint8)  # anonymous mappings are shared

    def arm(self, number: int, staged: Facts) -> None:
        payloads.stamp(self._source, number)

    def receive(self) -> None:
        self.link.wait()
        began = time.monotonic_ns()
        if self._fresh:
            self.tensor = np.empty(len(self._source), np.uint8)
        np.copyto(self.tensor, self._source)
        self._seconds = (time.monotonic_ns() - began) / 1e9

    def finish(self) -> Facts:
        self.tensor = EMPTY if self._fresh else self.tensor
        return {"seconds": self._seconds}


# The limit of a network: sendall and recv_into over one TCP connection, straight into the tensor.


class SocketSending(Sending):
    def connect(self, other: Facts) -> None:
        self._connection = socket.create_connection(("127.0.0.1", other["port"]), self.job.timeout_s)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closing.enter_context(self._connection)

    def send(self) -> None:
        self._connection.sendall(self.tensor.data)


class SocketReceiving(Receiving):
    def setup(self) -> None:
        self._listener = self.closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._listener.settimeout(self.job.timeout_s)

    def address(self) -> Facts:
        return {"port": self._listener.getsockname()[1]}

    def connect(self, other: Facts) -> None:
        self._connection = self.closing.enter_context(self._listener.accept()[0])
        self._connection.settimeout(self.job.timeout_s)

    def receive(self) -> None:
        self.fill(self._connection.recv_into)


# ZeroMQ multipart, PUSH to PULL, as in SGLang's default backend: a frame that describes, and a frame with the tensor.
# The binding copies neither frame (``copy=False`` on both sides), and nothing is pickled. SGLang joins the frames of a
# request into one tensor, which is a copy; the option ``in_place`` leaves it out, for requests of one frame.


def _zmq_socket(end: End, kind: int) -> zmq.Socket[bytes]:
    made = end.closing.enter_context(zmq.Context()).socket(kind)
    for option, value in ((zmq.LINGER, 0), (zmq.SNDTIMEO, end.job.timeout_s), (zmq.RCVTIMEO, end.job.timeout_s)):
        made.setsockopt(option, int(value * 1000))
    return end.closing.enter_context(made)


class ZeroMQSending(Sending):
    def setup(self) -> None:
        self._socket = _zmq_socket(self, zmq.PUSH)

    def connect(self, other: Facts) -> None:
        self._socket.connect(other["endpoint"])

    def stage(self, number: int) -> Facts:
        self._meta = msgspec.json.encode({"request": number, "dtype": "bfloat16", "shape": [self.job.tokens, -1]})
        return {}

    def send(self) -> None:
        self._sent = self._socket.send_multipart([self._meta, self.tensor.data], copy=False, track=True)

    def finish(self) -> Facts:
        if self._sent is not None:
            self._sent.wait(self.job.timeout_s)  # ZeroMQ reads the tensor until then
        return {}


class ZeroMQReceiving(Receiving):
    def setup(self) -> None:
        self._in_place, self._socket = bool(self.job.options.get("in_place")), _zmq_socket(self, zmq.PULL)
        self._socket.bind("tcp://127.0.0.1:*")

    def address(self) -> Facts:
        return {"endpoint": self._socket.getsockopt_string(zmq.LAST_ENDPOINT)}

    def receive(self) -> None:
        meta, frame = self._socket.recv_multipart(copy=False)
        msgspec.json.decode(meta.buffer)
        arrived = np.frombuffer(frame.buffer, np.uint8)
        if self._in_place:
            self.tensor = arrived
        else:
            np.copyto(self.tensor, arrived)

    def finish(self) -> Facts:
        self.tensor = EMPTY if self._in_place else self.tensor
        return {}


# A safetensors file in a folder that both sides see, as vLLM's example connector for encoder caches uses it: one file
# a request, written by ``save_file`` and read by ``load_file``. The folder is local unless ``--storage`` names another,
# so writes end in the page cache; a network file system is slower. No ``fsync``, like the connector.


class FilesSending(Sending):
    def setup(self) -> None:
        # numpy has no bfloat16; float16 has 2 bytes an element too.
        self._tensors = {"ec_cache": self.tensor.view(np.float16).reshape(self.job.tokens, -1)}

    def stage(self, number: int) -> Facts:
        self._path = Path(self.job.folder) / f"{os.getpid()}-{number}.safetensors"
        return {"path": str(self._path)}

    def send(self) -> None:
        save_file(self._tensors, self._path)
        self.link.tell()

    def finish(self) -> Facts:
        self._path.unlink()
        return {}


class FilesReceiving(Receiving):
    def arm(self, number: int, staged: Facts) -> None:
        self.tensor, self._path = EMPTY, staged["path"]

    def receive(self) -> None:
        self.link.wait()
        self.tensor = load_file(self._path)["ec_cache"].view(np.uint8)

    def finish(self) -> Facts:
        self.tensor = EMPTY
        return {}


# One HTTP GET on a kept connection, with the standard library; the client reads straight into the tensor. This is the
# fastest that HTTP in Python gets: frameworks copy the body on both sides.


class HttpGetSending(Sending):
    def setup(self) -> None:
        source = self.tensor

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = 0

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(len(source)))
                self.end_headers()
                self.wfile.write(source.data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="bench-http", daemon=True).start()
        self.closing.callback(self._server.socket.close)
        self.closing.callback(self._server.shutdown)

    def address(self) -> Facts:
        return {"port": self._server.server_port}


class HttpGetReceiving(Receiving):
    def connect(self, other: Facts) -> None:
        self._client = http.client.HTTPConnection("127.0.0.1", other["port"], timeout=self.job.timeout_s)
        self.closing.callback(self._client.close)

    def receive(self) -> None:
        self.link.wait()
        self._client.request("GET", "/embedding")
        with self._client.getresponse() as response:
            if response.status != 200:
                raise ConnectionError(f"status {response.status}")
            self.fill(response.readinto)


# The Mooncake Transfer Engine called directly: registered memory, one ``transfer_sync_write``, no copy beside its own.
# With the option ``tuned`` it has the settings of our own transport (pooled connections, larger slices); otherwise its
# defaults, except that it does not log each transfer.


def _mooncake_engine(end: End) -> Any:
    os.environ.update({"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "ERROR"} | (DEFAULTS if "tuned" in end.job.options else {}))
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        install = "on Debian apt-get install libibverbs1 libnuma1 libcurl4"
        raise UnavailableError(f"the engine does not load: {error}; {install}") from error
    engine, address = TransferEngine(), end.tensor.ctypes.data
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("the Mooncake engine did not start")
    if engine.register_memory(address, end.tensor.nbytes):
        raise RuntimeError("the Mooncake engine did not register the tensor")
    end.closing.callback(engine.unregister_memory, address)
    return engine


class MooncakeSending(Sending):
    def setup(self) -> None:
        self._engine = _mooncake_engine(self)

    def connect(self, other: Facts) -> None:
        self._write = (other["session"], self.tensor.ctypes.data, other["target"], self.tensor.nbytes)

    def send(self) -> None:
        if code := self._engine.transfer_sync_write(*self._write):
            raise RuntimeError(f"the Mooncake engine could not write (its code is {code})")
        self.link.tell()


class MooncakeReceiving(Receiving):
    def setup(self) -> None:
        self._engine = _mooncake_engine(self)

    def address(self) -> Facts:
        return {"session": f"127.0.0.1:{self._engine.get_rpc_port()}", "target": self.tensor.ctypes.data}


# NIXL called directly, over UCX: registered memory, connected agents, one write a round. UCX chooses how. Through
# NIXL's binding instead of its Python class, whose progress thread never sleeps.

PROGRESS_US = 1000
NAP_S = 20e-6
"""Between two looks whether a write has completed; without it the wait would fill a core."""


def _nixl_agent(end: End) -> tuple[Any, Any]:
    """Returns the binding, and an agent that has registered the tensor."""
    nixl = binding()
    config = nixl.nixlAgentConfig()
    config.useProgThread, config.pthrDelay, config.useListenThread = True, PROGRESS_US, False
    agent = nixl.nixlAgent(f"bench-{os.getpid()}", config)
    agent.createBackend("UCX", {})
    registered = nixl.nixlRegDList(nixl.DRAM_SEG, [(end.tensor.ctypes.data, end.tensor.nbytes, 0, "")])
    agent.registerMem(registered, [])
    end.closing.callback(agent.deregisterMem, registered, [])
    return nixl, agent


class NixlSending(Sending):
    def setup(self) -> None:
        self._nixl, self._agent = _nixl_agent(self)

    def connect(self, other: Facts) -> None:
        peer = self._agent.loadRemoteMD(base64.b64decode(other["metadata"]))
        self._peer = peer.decode() if isinstance(peer, bytes) else str(peer)
        self._agent.makeConnection(self._peer, [])
        self._target = other["target"]

    def send(self) -> None:
        nixl, agent, size = self._nixl, self._agent, self.tensor.nbytes
        here = nixl.nixlXferDList(nixl.DRAM_SEG, [(self.tensor.ctypes.data, size, 0)])
        there = nixl.nixlXferDList(nixl.DRAM_SEG, [(self._target, size, 0)])
        request = agent.createXferReq(nixl.NIXL_WRITE, here, there, self._peer, b"", [])
        status, deadline = agent.postXferReq(request, b""), time.monotonic() + self.job.timeout_s
        while status == nixl.NIXL_IN_PROG and time.monotonic() < deadline:
            time.sleep(NAP_S)
            status = agent.getXferStatus(request)
        if status != nixl.NIXL_SUCCESS:
            raise RuntimeError(f"NIXL could not write: {status}")
        self.link.tell()
        agent.releaseXferReq(request)


class NixlReceiving(Receiving):
    def setup(self) -> None:
        _, self._agent = _nixl_agent(self)

    def address(self) -> Facts:
        metadata = base64.b64encode(bytes(self._agent.getLocalMD())).decode()
        return {"metadata": metadata, "target": self.tensor.ctypes.data}
