"""``embferry top``: the live page of routers in a terminal.

``board`` is the state, from what the routers tell; ``header``, ``fleet``, ``requests``, ``times``, ``events`` and
``timeline`` make lines of it. These are pure. ``panel``, ``screens`` and ``app`` show the lines with textual, which is
imported nowhere else.
"""
