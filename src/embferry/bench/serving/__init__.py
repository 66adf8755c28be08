"""``embferry bench serve``: a workload of pictures for any chat endpoint, and the ways to split vLLM compared.

In the order in which to read it:

- ``workload`` is what is sent and when.
- ``client`` sends it and measures; ``stream`` reads one answer; ``answers`` says whether it is right; ``counters``
  reads the figures of the servers.
- ``endpoint`` is one run against a server that is there already.
- ``compare`` starts the servers that it compares: ``configurations`` and ``scenarios`` are tables, ``stack`` are
  the processes, ``corruption`` damages bytes on their way, ``vllm_plugins`` makes the comparison fair.
- ``results`` is what is measured, with the figures of ``vllm bench serve``; ``report`` is computed from it.
"""
