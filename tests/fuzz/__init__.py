"""A structured fuzzer of every parser: what a peer or a client sends, valid at first, then damaged.

How to read it: :mod:`.engine` says what an input and a target are and how a seed makes an input; :mod:`.tree` and
:mod:`.raw` hold the mutations; :mod:`.measure` the limits on work and memory; :mod:`.targets` has one parser a file;
:mod:`.found` the inputs that showed a fault. ``make fuzz`` runs :mod:`.__main__`, the tests are in :mod:`.test_fuzz`.
"""
