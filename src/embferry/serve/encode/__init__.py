"""The encode worker: pictures and videos in, embeddings out.

wire      what ``POST /encode`` takes and answers
prepare   bytes → checked, decoded, cut into patches
room      one request: what is still to be encoded, and the rows made so far
service   queues and the encoder's thread
metrics   its numbers
embeddings  an embedding as bytes, for any HTTP client
app       its HTTP endpoints
server    ``run``: the process
"""
