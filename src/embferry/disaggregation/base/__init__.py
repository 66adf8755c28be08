"""The contract a transport fulfils, and the poll statuses."""
