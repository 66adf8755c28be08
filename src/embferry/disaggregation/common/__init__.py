"""Manager, sender and receiver: drive the protocol over any transport."""
