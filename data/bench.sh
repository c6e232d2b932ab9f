#!/usr/bin/env bash
# Makes data/bench.txt, whose rows data/bench.md and README show. PyTorch and JAX must be installed (extra bench),
# and nothing else should run.
# Twelve minutes on two cores. bench-intel.txt is what it printed on another machine, bench-threads.txt at commit 547484a.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea bench > data/.bench.txt
mv data/.bench.txt data/bench.txt
