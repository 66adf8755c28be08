"""Endurance: kills and stops every process of a stack in the middle of transfers, many times.

``questions``  clients that keep asking, and what became of their requests
``stack``      the processes, and what each of them holds
``__main__``   the strikes, the checks and the report
"""
