#!/usr/bin/env bash
# Wheels of the distributions of this repository, and of what a GPU machine without a package index
# may lack, in the folder CARRY (ignored by git): to be installed there with
#   python3 -m pip install --no-index --no-deps CARRY/*.whl
set -euo pipefail
cd "$(dirname "$0")/.."
carry=${1:-carry}
mkdir -p "$carry"
rm -f "$carry"/attnproof*.whl
python3 -m pip wheel --quiet --no-deps --wheel-dir "$carry" ./packages/* ./harness
python3 -m pip download --quiet --no-deps --dest "$carry" pebble
ls "$carry"
