"""``embferry plan``: how many encoders and language instances a workload needs, and whether to split at all.

In the order in which to read it:

- ``model`` says how many visual tokens a picture has, and how many bytes a token; ``workload`` what is asked and when;
  ``speeds`` how long each stage takes, as a ``curve`` of the tokens.
- ``simulation`` plays the requests through the instances of a ``deployment``, event by event: ``clock`` shares the
  cores, ``station`` is a queue, ``link`` shares a network, ``engine`` is a language model that batches.
  ``outcome`` is what came of it.
- ``capacity`` is how many requests a second a deployment carries at most, ``pool`` how large the receive pool should
  be, ``effort`` how much to play, ``advice`` which deployment to take, ``goal`` the smallest that is
  fast enough. ``text`` and ``plot`` show it.
- ``probes`` says what to ask a running deployment, and computes the speeds from the times; ``measuring`` asks.
  ``comparison`` holds predictions against the results of ``embferry bench serve``.

All but ``files`` and ``measuring`` is pure: the same input gives the same plan.
"""
