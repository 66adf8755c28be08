"""OpenAI's API, as far as it is supported: requests and replies of chat completions, completions and responses.

``request``      chat requests; ``sampling``: the fields that all requests have which generate
``messages``     messages, pictures and videos; ``tool_calls``: calls in a history
``constraints``  the form of an answer
``fields``       what becomes of each field that does not work here; ``ignored``: those that are named in the reply
``reply``        replies to chat requests, events, errors
``completions``, ``responses``  requests and replies of these paths
"""
