"""The common parts of encode and language workers: HTTP application, process, transports, transfer settings."""
