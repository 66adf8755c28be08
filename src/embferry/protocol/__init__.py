"""The protocol, pure: no sockets, threads, clocks or tensors. Time is an argument, commands are data.

Read in this order: :mod:`messages` (what the peers say), :mod:`states` (the transition tables), :mod:`guards`
(every rule that keeps data safe), then :mod:`sender` and :mod:`receiver`.
"""
