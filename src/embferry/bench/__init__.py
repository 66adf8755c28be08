"""Measurements on the user's own machine, behind ``embferry bench``.

- ``transfer/`` compares the transports with each other and with other ways to move the same bytes.
- ``serving/`` sends a workload of pictures to a chat endpoint, and compares the ways to split vLLM.

Both use the modules of this folder: ``results`` (the JSON file), ``report`` (tables), ``show`` (tables in the terminal,
in Markdown and on the HTML page), ``machine`` (where it was measured) and ``processes`` (children and their output).
"""
