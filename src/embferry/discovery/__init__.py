"""Worker discovery: the table of leases, and the bootstrap server and client."""
