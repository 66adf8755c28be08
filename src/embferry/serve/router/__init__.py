"""The router: takes OpenAI-style requests, has them encoded by one worker and answered by another.

Read in the order of a request: ``edge`` (ids, sizes, keys), ``chat`` (one request from start to end), ``intake`` (its
pictures and videos), ``fleet`` (which workers there are), ``exchange`` (the talk with two of them).
"""
