"""How each transport compares, on this machine, with what else could have been used: ``embferry bench transfer``.

In the order in which to read it:

- ``contestants`` is the table of who takes part; ``contract`` is what each has to be able to do.
- ``ours`` and ``peers/`` fulfil it, one contestant a file.
- ``worker`` is one process with one end in it; ``child`` starts, asks and ends it; ``pair`` is a contestant's two.
- ``harness`` lets them take turns; ``plan`` says with which payloads, how often.
- ``results`` is what comes out, and all that ``table``, ``markdown``, ``page`` and ``targets`` know.
"""
