"""``embferry bench serve``: a workload of pictures for any chat endpoint, and the ways to split an engine compared.

In the order in which to read it:

- ``workload`` is what is sent and when.
- ``client`` sends it and measures; ``stream`` reads one answer; ``answers`` says whether it is right; ``counters``
  reads the figures of the servers.
- ``endpoint`` is one run against a server that is there already.
- ``compare`` starts the servers that it compares, of one of the ``engines``: ``vllm`` and ``sglang`` hold the
  configurations, the commands and the scenarios of one each, ``configurations`` and ``scenarios`` what they have in
  common. ``stack`` are the processes, ``faults`` the damage, ``corruption`` damages bytes on their way.
  ``documents`` reads what the servers say of themselves.
  ``vllm_plugins`` and ``sglang_plugins`` make the comparison fair; ``plugin_folder`` has an engine call them.
- ``results`` is what is measured, with the figures of ``vllm bench serve``; ``report`` is computed from it, with the
  ``ratios`` of configurations that ran side by side.
"""
