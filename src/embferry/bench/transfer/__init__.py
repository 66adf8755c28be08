"""``embferry bench transfer``: the transports beside other ways to move an embedding to another process.

In the order in which to read it:

- ``candidates`` lists what is compared; ``contract`` is what both ends of a candidate implement.
- ``library`` implements it with embferry, ``peers`` with everything else.
- ``worker`` is a process with one end of a candidate; ``pair`` controls a candidate's two processes.
- ``plan`` says which candidates meet with which payloads and how often; ``rounds`` lets them take turns.
- ``results`` is what is measured; ``report`` is computed from it.
"""
