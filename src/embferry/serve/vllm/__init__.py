"""The router before instances of vLLM that run its encode/prefill/decode split.

Read in the order of a request: ``chat`` (one request from start to end), ``split`` (its pictures and videos, and the
same request without them), ``intake`` (what they are, and their names), ``encoding`` (each to an instance that
encodes), ``connectors`` (what the EC connectors of vLLM want to be told), ``answering`` (an instance that answers, and
its first token), ``fleet`` (which instances there are), ``transfers`` (what consumers tell of embeddings under way).
"""
