"""Transports whose sender leases a window before it writes: ``nixl`` and ``mooncake``, whose engines cannot revoke.

A sender asks on a small TCP connection before each write (``ask``), gets a lease or a refusal (``verdict``), has its
engine write into the blocks, and says when no byte is in flight any more (``done``). :mod:`.leases` says why that makes
revocation true; :mod:`.messages` has the messages. :mod:`.receiving_end` receives. :mod:`.sending_end` sends, with the
thread in :mod:`.engine_thread`. :mod:`.nixl` and :mod:`.mooncake` bind the engines.
"""
