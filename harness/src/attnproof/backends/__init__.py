"""Backends that judge torch itself."""
