"""Backends that judge torch itself, and libraries that are called as they are."""
