"""Prove or refute that an implementation computes attention, and that it has not become slower."""
