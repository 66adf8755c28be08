"""Parts that the connectors of several engines have in common: metrics, managers, memory for several ranks."""
