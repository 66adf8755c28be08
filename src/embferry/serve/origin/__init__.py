"""Workers of this project in the place of SGLang's, behind its load balancer and on its wire (``--wire origin``).

The load balancer sends a chat request to one encode and one language server at once: the first gets all of it, the
second the texts alone. Both get a room and the bootstrap server of the encode side. The encode worker (:mod:`encode`)
embeds the whole prompt, the language worker (:mod:`language`) receives and answers it. ``docs/origin-wire.md`` says how
to run them.
"""
