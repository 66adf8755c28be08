"""``embferry bench transfer``: the transports beside other ways to move an embedding to another process.

In the order in which to read it:

- ``candidates`` lists what is compared; ``contract`` is what each candidate implements.
- ``library`` implements it with embferry, ``peers/`` with everything else, one candidate a file.
- ``worker`` is a process with one end of a candidate; ``pair`` controls a candidate's two processes.
- ``rounds`` lets candidates take turns; ``run`` says with which payloads and how often; ``sweeps`` varies one setting.
- ``results`` is what is measured; ``summary``, ``report``, ``targets`` and ``plots`` are computed from it.
"""
