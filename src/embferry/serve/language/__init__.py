"""The language worker: prompts and embeddings in, text out.

process          ``run``: the worker's process and its HTTP endpoints
messages         request and events of ``POST /generate``
job              one request: its state, its timing and its events
service          the jobs, and the engine thread
pipeline         the stages of a job: preallocation, transfer, generation
prompting        builds prompts beside the engine's thread
transfer_source  the rows of a transfer, as the engine reads them
job_trace        the spans of one job
metrics          Prometheus metrics
"""
