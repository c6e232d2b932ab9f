#!/usr/bin/env bash
# Makes data/bench.txt, the table that README shows; PyTorch must be installed, and nothing else should run. Ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea bench > data/.bench.txt
mv data/.bench.txt data/bench.txt
