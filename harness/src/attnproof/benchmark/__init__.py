"""How fast targets are: timed in rounds, each in a process of its own, and judged meanwhile.

Nothing is imported here: the process of a target times the import of torch.
"""
