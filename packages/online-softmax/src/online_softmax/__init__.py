"""From safe softmax to FlashAttention, step by step, in torch."""

from .arithmetic import TWO, Base, E
from .memory import Memory
from .state import State, absorb, fold, fold_tree, identity, lse, merge, output, state_of
from .steps import STEPS, Step

__all__ = [
    "STEPS",
    "TWO",
    "Base",
    "E",
    "Memory",
    "State",
    "Step",
    "absorb",
    "fold",
    "fold_tree",
    "identity",
    "lse",
    "merge",
    "output",
    "state_of",
]
