"""The origin's system under its own names: the queues of both sides, the pool, and its wire over Mooncake."""
