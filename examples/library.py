"""The library without the servers: 1,000 tokens cross from one side to the other through a pool of 32."""

import numpy as np

from embferry import Field, Geometry, Layout, ReceiveManager, SendManager, TcpTransport, as_fields, wait

layout = Layout((Field("input_embeddings", "float32", 128),))
room, embedding = 42, np.random.default_rng(0).standard_normal((1000, 128), np.float32)

encode_side = SendManager(layout, [TcpTransport()])
sender = encode_side.open(room)
sender.init(total_tokens=1000, content_digest=b"the same bytes, the same digest")
sender.send_embedding(as_fields({"input_embeddings": embedding}))

language_side = ReceiveManager(Geometry(layout, num_blocks=4, block_size=8), [TcpTransport()])
receiver = language_side.open(room, encode_side.endpoint)
receiver.init()
wait(receiver, timeout=10)
arrived = receiver.arrays()["input_embeddings"].view(np.float32)
print(f"{len(arrived)} tokens in {receiver.transfers} transfers; equal: {np.array_equal(arrived, embedding)}")

receiver.clear()
language_side.close()
encode_side.close()
