"""Pictures and videos from outside: fetching, checking, decoding. Nothing here is trusted before it is checked.

Routers fetch (:mod:`.fetch`, which needs no decoder) and ours checks headers (``check_*``); encode workers decode
(``decode_*``, in :mod:`.image` and :mod:`.video`). Every refusal is a :class:`~embferry.serve.errors.ServeError` with
its own code.
"""
