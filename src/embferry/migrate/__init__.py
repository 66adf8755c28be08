"""From the origin's earlier family of names to the present one, in a user's code and log searches.

:mod:`renames` is the table, :mod:`words` applies it to text, :mod:`python` to code and :mod:`text` to searches in
scripts, configurations and documents; :mod:`run` walks paths. Nothing here is imported by the rest of the project.
"""
