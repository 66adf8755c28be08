"""The encode worker: pictures and videos in, embeddings out.

process             ``run``: the worker's process and its HTTP endpoints
messages            request and response of ``POST /encode``
preparation         media files → decoded items, cut into patches
shared_cache        embeddings that were encoded before, or by another encoder
room                one request: the items still to encode, and the embedding so far
service             rooms, queues and the encoder thread
turns               which request is encoded next
self_test           whether the worker encodes at all, by a tiny picture of its own
embedding_resource  ``/embeddings/{room}``: an embedding as bytes, for any HTTP client
freed_memory        returns freed memory to the system
room_trace          the spans of one room
metrics             Prometheus metrics
"""
