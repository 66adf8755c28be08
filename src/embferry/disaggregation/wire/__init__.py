"""The origin's control plane, pure: its frames, its statuses, one sender's side of it. No sockets, threads, clocks.

Read in this order: :mod:`frames` (what a receiver says), :mod:`statuses` (what a sender answers), :mod:`rooms` (what a
sender does about it, as commands). :mod:`fields` reads single frames. ``docs/origin-wire.md`` has the tables.
"""
