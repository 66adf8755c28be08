"""What encode and language workers have in common: HTTP around a service, its process, its transfers' settings."""
