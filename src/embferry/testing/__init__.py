"""Public test doubles: simulated network, transport conformance suite, fault proxy."""
