"""The router before workers of this project: one worker encodes a request's media, another one answers.

In the order of a request:

``process``      the process of either router
``app``          the application
``asked``        a request of any path, in the form in which workers get it
``chat``         one request from start to end
``tokens``       ``/tokenize`` and ``/detokenize``
``attempts``     whether a failed attempt is followed by another one, and where
``media``        its pictures and videos
``fleet``        the workers
``worker_source`` how the fleet learns of workers
``worker_call``  the calls of a request to two of them
``worker_events`` the events of a language worker, checked
"""
