"""Untrusted pictures and videos: fetching, checking, decoding.

The routers fetch files with :mod:`.fetch`, which needs no decoder. The router before workers of this project also
checks the headers (``check_*``). Encode workers decode (``decode_*``, in :mod:`.image` and :mod:`.video`). Every
refusal is a :class:`~embferry.serve.errors.ServeError` with its own code.
"""
