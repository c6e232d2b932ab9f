#!/usr/bin/env bash
# Makes the weights in the package, their table and README's demo: about a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea train --suite aio5+patchwork --steps 30000 --out runs/weights
cp runs/weights/model.safetensors tinycea/weights/default.safetensors
cp runs/weights/result.json tinycea/weights/default.json
tinycea demo -o data/demo.png
