"""Where targets run: a process of their own, memory that the parent can look at.

Nothing is imported here: the process that targets are forked from must not know the judge.
"""
