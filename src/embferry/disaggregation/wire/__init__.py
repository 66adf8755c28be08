"""The origin's control plane as pure rules, without sockets, threads or clocks.

Read in this order: :mod:`requests` (messages of a receiver), :mod:`statuses` (messages of a sender),
:mod:`sender_rooms` (state of a sender), :mod:`receiver_room` (state of a receiver).
``docs/origin-wire.md`` has the tables.
"""
