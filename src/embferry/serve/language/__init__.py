"""The language worker: prompts and embeddings in, text out.

wire      what ``POST /generate`` takes, and the events it answers with
job       one request on its way through
source    the rows of a transfer, as the engine reads them
engine    the model's scheduler and the transfer's queues, moved on by one thread
service   that thread, and the face of it for others
metrics   its numbers
app       its HTTP endpoints
server    ``run``: the process
"""
