"""Socket building blocks shared by the transports: event loop, listener, outgoing connections."""
