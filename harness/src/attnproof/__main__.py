"""``python -m attnproof``."""

from .cli import main

main()
