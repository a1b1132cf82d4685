"""Backends in other libraries: ``attnproof.integrations.transformers``."""
