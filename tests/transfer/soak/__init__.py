"""Soak: a great many transfers in one pair of processes, with aborts, lost connections, refusals and random sizes.

``rooms``      what happens in each room, drawn from a seed
``end``        one end of the pair, as a process
``pair``       both processes, with a relay between them, and what they hold
``soak``       a whole run: batches of rooms, samples, and the checks
``plot``       the picture of a run
``__main__``   the command
"""
