#!/usr/bin/env bash
# Makes the weights in the package, their tables and README's demo: six hours on two cores. The argument is a folder of the 200
# test images of BSDS500: the first hundred by name chose, the last hundred test.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d runs/photographs ] || python -m tinycea.lab.photographs runs/photographs
python data/weights.py
tinycea demo -o data/demo.png
mkdir -p data/results/harm
python -m tinycea.lab.harm "$1" --classical > data/results/harm/test.txt
