"""Both ends of the origin's wire: control messages over ZeroMQ, data by one-sided writes of the Mooncake engine.

The rules of the wire are in :mod:`embferry.disaggregation.wire`; this package executes them on sockets, engines and
memory. Read in this order:

- :mod:`settings`, then :mod:`zmq_thread`, the driver thread and its sockets, and :mod:`manager`, the rooms and the
  handles: the same for both sides.
- Encode side: :mod:`encode_manager`, with :mod:`session_engines` (one engine for each session that is written to) and
  :mod:`buffer_layout` (where the bytes of a token lie in the peer's buffers).
- Language side: :mod:`language_manager`, with :mod:`pool_mapping` (the blocks and the memory that peers write to),
  :mod:`write_marks` (whether they have written it) and :mod:`encode_ranks` (where the encode ranks are).
- :mod:`conn_multimodal`: the classes of both sides under the names that SGLang's users know.

``docs/origin-wire.md`` has the tables of the format.
"""

try:
    import zmq as _zmq  # noqa: F401
except ImportError as error:
    raise ImportError("the origin's wire needs pyzmq; pip install 'embferry[mooncake]'") from error
