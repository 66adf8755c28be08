"""``embferry bench transfer``: the transports beside other ways to move an embedding to another process.

In the order in which to read it:

- ``candidates`` lists what is compared, ``payloads`` what is sent; ``contract`` is what both ends of a candidate
  implement.
- ``library`` implements it with embferry, ``small`` with many transfers in one round, ``peers`` with everything else.
  ``trust`` makes the key and the certificates of candidates that measure their cost.
- ``worker`` is a process with one end of a candidate; ``pair`` controls a candidate's two processes.
- ``plan`` says which candidates meet with which payloads and how often, ``sweeps`` which settings of embferry vary;
  ``rounds`` lets them take turns.
- ``results`` is what is measured; ``report`` and, for one or several runs, ``targets`` are computed from it.
"""
