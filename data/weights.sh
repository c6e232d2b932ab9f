#!/usr/bin/env bash
# Makes the weights in the package, their table and README's demo: about 50 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea train --suite aio3+aio5+cdd11+patchwork --adapter cea:width=32 --steps 64000 --out runs/weights
cp runs/weights/model.safetensors tinycea/weights/default.safetensors
cp runs/weights/result.json tinycea/weights/default.json
tinycea demo -o data/demo.png
# Other trainings, not shipped (data/results/weights): --suite aio3+aio5+cdd11+patchwork with --adapter cea:tokens=X,width=32
# --steps 80000 or --adapter cea:tokens=X --steps 40000; --suite aio3+aio5+patchwork --adapter cea:width=32 --steps 32000;
# --suite aio5+patchwork --steps 30000, and the same with --adapter cea:tokens=X. Their models in runs/candidates are compared by
# python -m tinycea.lab.candidates runs/candidates/*.safetensors > data/results/weights/validation.txt
