"""Sphinx configuration of the documentation."""

import tomllib
from pathlib import Path

harness = Path(__file__).parents[1] / "harness" / "pyproject.toml"

project = "attnproof"
author = "attnproof contributors"
release = tomllib.loads(harness.read_text("utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.mathjax"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages may start below a heading of level 1

html_theme = "furo"
html_title = f"attnproof {release}"
