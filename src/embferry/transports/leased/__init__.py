"""Transports whose sender leases a window of blocks before it writes: NIXL and Mooncake."""
