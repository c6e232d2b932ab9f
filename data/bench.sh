#!/usr/bin/env bash
# Makes data/bench.txt, whose rows data/bench.md and README show. PyTorch must be installed, and nothing else should run.
# Ten to fifteen minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea bench > data/.bench.txt
mv data/.bench.txt data/bench.txt
