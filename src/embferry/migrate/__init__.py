"""Rewrites a user's code and log searches from the origin's earlier names to the present ones.

:mod:`words` holds the table of names and applies it to text, :mod:`python` to Python code and :mod:`text` to searches
in scripts, configurations and documents; :mod:`run` applies these to files. Nothing here is imported by the library.
"""
