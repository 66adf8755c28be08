"""The common base of the HTTP servers of this package: both routers, the encode workers and the language workers.

``serving``     a listening socket, and uvicorn until a signal
``address``     the addresses and URLs of a process
``connections`` bounds on the connections of a server
``descriptors`` the descriptors of a process, and who may have how many
``app``         a router's application: edge, error responses, status pages, lifespan
``backends``    base of both fleets
``edge``        the outermost layer of a router: request ids, clients' limits, the access log
``clients``     the clients of a router and their limits
``api_keys``    their API keys
``status``      a router's ``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/v1/models``
``chat``        one chat request: body, client that leaves, time limit, errors, response
``body``        reading a request body of limited size, and its pace
``encoding``    request bodies packed with gzip
``digests``     digests of the messages that a server receives and sends
``calls``       calls of other parts, with digests
``proofs``      proofs of the cluster key, at both ends
``disconnect``  cancelling work when its client leaves
``errors``      exceptions as error responses
"""
