"""The common base of the HTTP servers of this package: both routers, the encode workers and the language workers.

``serving``    a listening socket, and uvicorn until a signal
``app``        a router's application: edge, error responses, status pages, lifespan
``backends``   base of both fleets
``edge``       the outermost layer of a router: request ids, the API key, the access log
``status``     a router's ``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/v1/models``
``chat``       one chat request: body, client that leaves, time limit, errors, response
``body``       reading a request body of limited size, and checking its digest
``digests``    digests of requests and whole answers
``calls``      the same at the end that calls
``proofs``     proofs of the cluster key, at both ends
``disconnect`` cancelling work when its client leaves
``errors``     exceptions as error responses
"""
