#!/usr/bin/env bash
# Makes data/results: the comparison that README quotes, the choices before it and the questions after it. Hours on two cores; what
# runs/ already holds is not trained again, so it may be stopped and started at will.
set -euo pipefail
cd "$(dirname "$0")/.."
rivals="wider static mlp descriptor prompt experts-image experts-token"
bare=$(for name in $rivals cea; do echo "$name:sca=false"; done)

publish() {                                   # NAME TABLE ARGUMENTS: the table and pictures of a comparison kept in runs/NAME
    mkdir -p "data/results/$1"
    tinycea compare --out "runs/$1" "${@:3}" > "runs/$1-$2.txt"
    cp "runs/$1-$2.txt" "data/results/$1/$2.txt"
    cp "runs/$1/runs.jsonl" "data/results/$1/"
    for picture in cost strip; do cp "runs/$1/$picture.png" "data/results/$1/$2-$picture.png"; done
}

mkdir -p runs
publish tuning rates --split validation --suites aio5 patchwork --adapters cea ${rivals#wider } --rates 0.1 0.3 1 --seeds 1
publish headline table
publish headline without-sca --suites aio5 patchwork --adapters $bare
python data/questions.py runs/headline > runs/questions.txt && cp runs/questions.txt data/results/
publish length steps --suites aio5 patchwork --steps 4000 --seeds 2
