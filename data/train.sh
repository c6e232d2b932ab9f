#!/usr/bin/env bash
# Makes the runs of data/train that README quotes: with CEA and without an adapter, one to two minutes each on two cores. With
# an argument, a folder of the 200 test images of BSDS500, also validation.txt: three seeds on sixteen of its first hundred.
# validation-before.txt was made by the same lines, with the code of commit 0125695.
set -euo pipefail
cd "$(dirname "$0")/.."
for adapter in cea none; do
    tinycea train --adapter $adapter --out runs/$adapter
    mkdir -p data/train/$adapter
    cp runs/$adapter/{result.json,curve.png} data/train/$adapter/
done
[ $# -gt 0 ] || exit 0
for seed in 0 1 2; do
    tinycea train --seed $seed --out runs/default-$seed > /dev/null
    echo "seed $seed"
    python -m tinycea.lab.harm "$1" --split validation --count 16 --weights runs/default-$seed/model.safetensors
    echo
done > data/train/validation.txt
