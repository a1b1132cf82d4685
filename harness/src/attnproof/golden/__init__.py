"""The checked-in truth, recomputed and compared."""
