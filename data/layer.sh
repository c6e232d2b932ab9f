#!/usr/bin/env bash
# Makes data/results/layer and data/results/stains, hours on two cores. The argument is a folder of the 200 test images of
# BSDS500; its last hundred by name are tested on.
set -euo pipefail
cd "$(dirname "$0")/.."
tinycea mechanism --test "$1" -o runs/mechanism.png > data/results/layer/mechanism.txt
tinycea mechanism --long --test "$1" > data/results/layer/long.txt
python data/attention.py "$1" > data/results/layer/attention.txt
[ -d runs/photographs ] || python -m tinycea.lab.photographs runs/photographs
tinycea compare --suites aio5 cdd11 patchwork --seeds 3 --test "$1" --images runs/photographs --out runs/told \
    --adapters none cea cea:norm=image,tokens=Xhat cea:norm=token,tokens=X cea:norm=token,tokens=Xhat \
    > data/results/layer/four.txt
python -m tinycea.lab.stains runs/photographs "$1" > data/results/stains/test.txt
python data/instruments.py "$1" runs/stains/models/stains-{cea,cea_sca_false,cea-softmax}-4000-seed0-*.safetensors \
    > data/results/stains/instruments.txt

chosen() {                                    # STATEMENT about the rows of lab.stains, ARGUMENTS
    python -c "
from tinycea.lab import stains
stains.$1
stains.main()" runs/photographs "${@:2}"
}
# Guided, the other rivals at their usual rates: one seed; of the best of them three.
guided() {                                    # ROWS, ARGUMENTS
    chosen "OPTIONS = {'': (), ':told=15': ('none', $1, 'descriptor', 'cea')}
stains.MODELS |= dict.fromkeys(('prompt', 'experts-image', 'experts-token'))" "${@:2}"
}
guided "'wider', 'prompt', 'experts-image', 'experts-token'" "$1" --seeds 1 > data/results/stains/guided.txt
guided "'prompt'" "$1" > data/results/stains/guided-prompt.txt
cp runs/stains/runs.jsonl data/results/stains/

# Three times the steps, fewer rows: one seed with SCA, three without.
longer() { chosen "OPTIONS = $1" "${@:2}" --steps 12000 --out runs/stains-longer; }
longer "{'': ('none', 'cea-softmax', 'cea'), ':sca=false': stains.OPTIONS[':sca=false']}" "$1" --seeds 1 \
    > data/results/stains/longer.txt
longer "{'': (), ':sca=false': ('none', 'descriptor:norm=image,sca=false', 'cea')}" "$1" \
    > data/results/stains/longer-without-sca.txt
cp runs/stains-longer/runs.jsonl data/results/stains/longer.jsonl       # all but those with SCA, which were not kept
