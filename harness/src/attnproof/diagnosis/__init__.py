"""What a deviating answer looks like, and where it deviates."""
