"""How much room the budget leaves honest kernels: ``python -m attnproof.calibration``."""
