"""``python -m attnproof``."""

from .cli.main import main

main()
