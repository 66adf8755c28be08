"""The origin's control plane as pure rules, without sockets, threads or clocks.

Read :mod:`messages` first, then :mod:`sender_rooms` (state of a sender) and :mod:`receiver_room` (state of a receiver).
``docs/origin-wire.md`` has the tables.
"""
