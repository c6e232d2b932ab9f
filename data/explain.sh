#!/usr/bin/env bash
# Makes data/explain.html: the microscope on a photograph under stains, with a network taught on them, seconds on two cores.
# data/stains.safetensors is runs/stains/models/stains-cea_sca_false-4000-seed1-*.safetensors of layer.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs
python -c "import skimage, imageio.v3 as iio; iio.imwrite('runs/astronaut.png', skimage.data.astronaut()[:256, 96:352])"
tinycea degrade runs/astronaut.png --as stains --seed 1 -o runs/stained.png
tinycea explain runs/stained.png -o data/explain.html --weights data/stains.safetensors
