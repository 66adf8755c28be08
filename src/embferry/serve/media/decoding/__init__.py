"""Decoding in processes of its own, so that a file can harm nothing but its own request.

``messages``      what both ends say
``process``       the process that decodes, within limits of memory and time
``confinement``   takes rights from that process
``system_calls``  the filter of system calls of that process
``child``         one such process, as its parent sees it
``pool``          the few that a router or worker has
``cancellation``  work that is not wanted any more
``media``         the calls of router and encode worker
"""
