"""Deployments by systems that start, place and watch the processes themselves, in place of our supervisor."""
