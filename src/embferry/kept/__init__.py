"""Embeddings under way, in files in memory: what has arrived outlives a language worker that is killed.

A worker gathers an embedding straight into the mapping of such a file, and holds a lock on it. The kernel releases the
lock of a process that has died. The worker that gets the request next, on the same host, then takes the file over,
verifies it, and the transfer resumes behind the tokens in it.
"""
