"""The origin's control plane as pure rules, without sockets, threads or clocks.

Read :mod:`messages` and :mod:`room` first, then :mod:`sender_rooms` (a sender) and :mod:`receiver_room` (a receiver).
``docs/origin-wire.md`` has the tables.
"""
