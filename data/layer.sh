#!/usr/bin/env bash
# Makes data/results/layer. The argument is a folder of the 200 test images of BSDS500; its last hundred by name are tested on.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea mechanism --test "$1" -o runs/mechanism.png > data/results/layer/mechanism.txt
tinycea compare --suites aio5 cdd11 --seeds 1 --steps 1000 --out runs/layer --adapters none cea cea:norm=image,tokens=Xhat \
    cea:norm=token,tokens=X cea:norm=token,tokens=Xhat > data/results/layer/four.txt
