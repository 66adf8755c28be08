"""A multimodal workload against any chat endpoint, and vLLM's ways to split compared: ``embferry bench serve``.

In the order in which to read it:

- ``workload`` is what is sent, and when; ``pictures`` makes the pixels.
- ``driver`` sends and measures it; ``stream`` is one answer; ``answers`` says whether it is right.
- ``summary`` has the figures, by the definitions of ``vllm bench serve``; ``counters`` those of the servers.
- ``alone`` is one run against an endpoint that is there.
- ``compare`` starts what it compares: ``configurations`` and ``scenarios`` are the tables, ``stack`` and ``server`` the
  processes, ``corruption`` what is done to bytes on their way.
- ``results`` is what comes out, and all that ``report``, ``terminal`` and ``markdown`` know.
"""
