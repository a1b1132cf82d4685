"""From what a target gave to a verdict."""
