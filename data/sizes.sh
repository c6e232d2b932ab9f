#!/usr/bin/env bash
# Makes data/sizes.txt: how restoring grows from 1 to 100 megapixels, and the seams that windows leave. Nothing else should run.
# About five minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python data/sizes.py 1 12 48 100 > data/.sizes.txt
mv data/.sizes.txt data/sizes.txt
