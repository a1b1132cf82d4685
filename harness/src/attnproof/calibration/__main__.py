"""``python -m attnproof.calibration``."""

from .command import main

raise SystemExit(main())
