"""The serving stack: router, workers, bootstrap, supervisor. One package a process."""
