"""The driver of the origin's wire: control plane over ZeroMQ, data over one-sided writes of the Mooncake engine.

Read in this order: :mod:`settings`, :mod:`manager` (the thread and its sockets), then one side: :mod:`sending` with
:mod:`transports` (engines) and :mod:`rows` (what lies where), or :mod:`receiving` with :mod:`receiver` (one room),
:mod:`landing` (the memory peers write to), :mod:`marks` (whether they have) and :mod:`directory` (where ranks are).
The rules are :mod:`embferry.disaggregation.wire`'s; ``docs/origin-wire.md`` has the tables.
"""
