"""The common base of the HTTP servers of this package: both routers, the encode workers and the language workers.

``serving``     a listening socket, and uvicorn until a signal
``address``     the addresses and URLs of a process
``connections`` bounds on the connections of a server
``tls_handshake`` TLS's handshake within those bounds
``descriptors`` the descriptors of a process, and who may have how many
``app``         a router's application: edge, error responses, status pages, lifespan
``exact_paths`` an application without Starlette's redirects
``heads``       refuses requests with an ambiguous head
``absolute_targets`` requests that name their target by a whole URL
``unproved``    limits on requests without a proof of the cluster key
``backends``    base of both fleets
``edge``        the outermost layer of a router: request ids, clients' limits, the access log
``clients``     the clients of a router and their limits
``api_keys``    their API keys
``status``      a router's ``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/v1/models``
``fleet_pages`` its ``/workers``, ``/sd`` and ``/debug/pool``
``journal``     what a router is doing; pure, with ``samples``, times by the second
``watching``    the journal over HTTP: ``/activity``
``request_trace`` the spans of one request
``chat``        one chat request: body, client that leaves, time limit, errors, response
``body``        reading a request body of limited size, and its pace
``encoding``    request bodies packed with gzip
``digests``     digests of the messages that a server receives and sends
``calls``       calls of other parts, with digests
``answers``     JSON in the answers of other servers
``proofs``      proofs of the cluster key, at both ends
``disconnect``  cancelling work when its client leaves
``errors``      exceptions as error responses
"""
