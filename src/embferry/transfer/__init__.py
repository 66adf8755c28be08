"""The driver: its thread, the managers, one record for each transfer, sinks and staging."""
