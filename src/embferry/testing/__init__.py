"""Public test tools: the conformance suite for transports, a fault proxy, a simulated network."""
