"""ZeroMQ multipart, PUSH to PULL, as in SGLang's default backend: a frame that describes, and a frame with the tensor.

The binding copies neither frame (``copy=False`` on both sides), and nothing is pickled. SGLang joins the frames of a
request into one tensor, which is a copy; the option ``in_place`` leaves it out, for requests of one frame.
"""

from __future__ import annotations

import msgspec
import numpy as np
import zmq

from ..contract import Bytes, Facts, Job, Link, Sending, TensorReceiving


class ZeroMQSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        super().__init__(job, source, link)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, int(job.timeout_s * 1000))

    def connect(self, other: Facts) -> None:
        self._socket.connect(other["endpoint"])

    def stage(self, number: int) -> Facts:
        self._meta = msgspec.json.encode({"request": number, "dtype": "bfloat16", "shape": [self.job.tokens, -1]})
        return {}

    def send(self) -> None:
        self._sent = self._socket.send_multipart([self._meta, self.source.data], copy=False, track=True)

    def finish(self) -> Facts:
        if self._sent is not None:
            self._sent.wait(self.job.timeout_s)  # ZeroMQ reads the tensor until then
        return {}

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class ZeroMQReceiving(TensorReceiving):
    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self._in_place = bool(job.options.get("in_place"))
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(job.timeout_s * 1000))
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
        if self._in_place:
            self.tensor = np.empty(0, np.uint8)
        return {}

    def close(self) -> None:
        self._socket.close()
        self._context.term()
