"""The router before instances of vLLM that run its encode/prefill/decode split.

In the order of a request:

``app``             the application
``endpoint``        what all paths share
``chat``            one chat request from start to end
``passed_on``       the paths that are passed on as they are
``responses``       ``/v1/responses``, whose pictures encode instances encode
``fields``          the fields that vLLM knows
``constraint_bounds`` bounds on the forms that answers are to have
``client_request``  a client's request, as everything after it hands it on
``media_parts``     its pictures, videos and sounds, and the same request with other parts in their place
``video_files``     the video files that may go to an instance
``sound_files``     the sound files that may go to an instance
``named_media``     files that later requests name without sending them
``items``           their content and their names
``prompt_prefixes`` what the prefix cache of an instance may cover
``received_cache``  deduplication: items that the language instance has received already are not encoded again
``early``           decides which language instances are asked before the items are encoded
``picture_sizes``   the size of a picture before it is encoded
``item_encoder``    encodes each item at an instance
``losses``          instances that ended while they encoded an item
``probe_items``     a picture and a sound of the router's own
``fitness``         encode instances that fail every encode
``refused_items``   what an instance's refusal of a file means
``connectors``      the parameters that vLLM's EC connectors want
``language_call``   asks a language instance, up to its first token
``given_up``        answers that an instance has given up
``stages``          asks a prefill instance, then a decode instance
``texts``           the texts of a request, counted before an instance renders them
``failures``        failures that need their own handling
``instance_digests`` digests between the router and an instance
``instance_proofs`` proofs of the cluster key on that hop
``instance_part``   a module of vLLM that an instance changes
``instance_videos`` protects an instance from damaged video files
``instance_sounds`` protects an instance from sounds of odd rates
``instance``        one instance
``instance_models`` the list of models of an instance, checked
``instance_source`` how the fleet learns of instances
``fleet``           all instances
``failover``        what consumers report of embeddings under way, and their replacement
``metrics``         Prometheus metrics
"""
