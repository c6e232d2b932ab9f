#!/usr/bin/env bash
# Makes the weights in the package, their tables and README's demo: 12 hours on two cores. The argument is a folder of the 200
# test images of BSDS500: the first hundred by name chose, the last hundred test.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d runs/photographs ] || python -m tinycea.lab.photographs runs/photographs
[ -d runs/more ] || python -m tinycea.lab.photographs runs/more budgie-backgrounds lxqt-themes palapeli-data
python data/weights.py
tinycea demo -o data/demo.png
mkdir -p data/results/harm
python data/spare.py "$1" > data/results/harm/spare.txt
python -m tinycea.lab.harm "$1" --classical > data/results/harm/test.txt
# With `pip install bm3d`, a third of an hour: python -m tinycea.lab.harm "$1" --classical --count 20 > data/results/harm/bm3d.txt

# The choice among the last networks. The first table in validation.txt was made with MARGIN = 0 in restoration.py.
PYTHONPATH=data python -c 'import weights
weights.mean("runs/mean-16.safetensors", "runs/weights-16/model.safetensors", "runs/mean-17.safetensors")
weights.mean("runs/mean-18.safetensors", "runs/weights-18/model.safetensors", "runs/mean-19.safetensors")
weights.mean("runs/weights-21/model.safetensors", "runs/weights-22/model.safetensors", "runs/mean-22.safetensors")'
for model in weights-7/model weights-8/model mean-9 weights-9/model mean-10 weights-10/model mean-11 \
        weights-11/model weights-12/model mean-13 weights-13/model mean-14 weights-14/model mean-15 \
        weights-15/model mean-16 weights-16/model mean-17 weights-17/model mean-18 weights-18/model mean-19 \
        weights-19/model weights-20/model mean-21 weights-21/model weights-22/model mean-22; do
    echo "runs/$model.safetensors"
    python -m tinycea.lab.harm "$1" --split validation --count 40 --weights "runs/$model.safetensors"
    echo
done > data/results/harm/validation.txt
