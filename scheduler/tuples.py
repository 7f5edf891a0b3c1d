"""Tuples with names, made quickly: from their fields in order, in a third of the time that a call of their type takes.

For what is made for every request; fields that have defaults must be given too.
"""

made = tuple.__new__
