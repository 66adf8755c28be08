"""A relay in every hop of a real stack, which delays, stalls, resets, cuts, loses, repeats, reorders and damages.

``stack``      the processes, each reached through relays only
``messages``   where a message of a hop ends, for faults of whole messages
``table``      the combinations: hop, direction, fault
``trial``      one combination: a question is asked while the fault strikes
``__main__``   the whole table, and flipped bits at random places
"""
