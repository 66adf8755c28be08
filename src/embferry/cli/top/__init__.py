"""``embferry top``: the live page of routers in a terminal.

``command`` is the command. ``board`` is the state, from what the routers tell; ``header``, ``fleet``, ``requests``,
``times``, ``events`` and ``timeline`` make lines of it, with ``lines``, ``bars`` and ``colours``. These are pure.
``panel``, ``request_list``, ``screens`` and ``app`` show the lines with textual, which is imported nowhere else.
"""
