#!/usr/bin/env bash
# Makes data/results: the comparison that data/README.md quotes, the choices before it and the questions after it. Hours on two
# cores; what runs/ already holds is not trained again, so it may be stopped and started at will. The argument is a folder of the
# 200 test images of BSDS500. All but data/results/told was run when `cea` was what cea:norm=token,tokens=Xhat is now.
#
# Not made here: questions.txt and ranks.txt, of the layer's first form (tinycea/lab of commit 8a64336).
# Nor data/results/beyond. Its runs know switches that were given up. The patches that added them are deleted; git
# history holds them (git log -- data/results/beyond). switches.patch goes on top of commit f2c693b; its raw=true is now tokens=X.
# windows.patch goes on top of commit a57b6bb; with it windows.* came from: tinycea compare --split validation --suites aio5
# patchwork --seeds 2 --adapters cea cea:window=6 cea:window=4 cea:gates=true --out runs/windows
# and windows-ranks.txt from: python data/ranks.py runs/windows
set -euo pipefail
cd "$(dirname "$0")/.."
adapters="none told wider static mlp descriptor prompt experts-image experts-token cea" now="--test $1 --images runs/photographs"
rivals="wider static mlp descriptor prompt experts-image experts-token"
bare=$(for name in $rivals cea; do echo "$name:sca=false"; done)

publish() {                                   # NAME TABLE ARGUMENTS: the table of a comparison kept in runs/NAME
    mkdir -p "data/results/$1"
    tinycea compare --out "runs/$1" "${@:3}" > "runs/$1-$2.txt"
    cp "runs/$1-$2.txt" "data/results/$1/$2.txt"
    cp "runs/$1/runs.jsonl" "data/results/$1/"
}

mkdir -p runs data/results/length
publish tuning rates --split validation --suites aio5 patchwork --adapters cea ${rivals#wider } --rates 0.1 0.3 1 --seeds 1
publish headline table
cp runs/headline/cost.png data/results/headline/table-cost.png
publish headline without-sca --suites aio5 patchwork --adapters $bare
cp runs/headline/cost.png data/results/headline/without-sca-cost.png
publish headline tokens --adapters $rivals cea cea:tokens=X
publish headline tokens-without-sca --suites aio5 patchwork --adapters cea:sca=false cea:tokens=X,sca=false
tinycea compare --suites aio5 --adapters $rivals cea cea:tokens=X --steps 1000 4000 16000 --seeds 1 --out runs/headline \
    > data/results/length/aio5-seed0.txt
rivals="wider mlp descriptor experts-image"
tinycea compare --suites aio5 patchwork --adapters $rivals cea --steps 1000 4000 --seeds 2 --out runs/headline \
    > data/results/length/steps.txt
tinycea compare --suites patchwork --adapters $rivals cea cea:tokens=X --steps 1000 4000 16000 --seeds 1 --out runs/headline \
    > data/results/length/patchwork-seed0.txt
publish ablation tokens --split validation --suites aio5 patchwork --adapters wider experts-image descriptor cea cea:tokens=X \
    cea:tokens=X,slots=decoders.0 cea:slots=decoders.0 cea:slots=decoders.0,width=26,heads=2
publish ablation table --split validation --suites aio5 patchwork --seeds 2 --adapters cea none cea-image cea-softmax cea-topk \
    cea-static-A cea-static-U cea-static cea:rank=2 cea:rank=4 cea:rank=16 cea:rank=32 cea:heads=1 cea:heads=8 \
    cea:probe_channels=12 cea:probe_channels=48 cea:slots=middle_blks cea:slots=decoders.0

# The layer as it is, with its ceiling.
[ -d runs/photographs ] || python -m tinycea.lab.photographs runs/photographs
publish told table --suites aio5 cdd11 patchwork --adapters $adapters --seeds 3 $now
longer() { tinycea compare --out runs/told --seeds 3 --steps 4000 $now "$@"; }
longer --suites aio5 cdd11 patchwork --adapters none told mlp descriptor cea
longer --suites aio5 --adapters cea descriptor --rates 0.03
longer --suites aio5 --adapters none told --seeds 5
longer --suites aio5 --adapters cea --rates 0.03 --seeds 5
longer --suites aio5 --adapters wider static prompt experts-image experts-token
longer --suites aio3 --adapters none told mlp
longer --suites aio3 --adapters cea descriptor --rates 0.03
longer --suites aio5 --adapters none:sca=false told:sca=false cea:sca=false
longer --suites aio5 --adapters cea:sca=false descriptor:sca=false --rates 0.03
longer --suites cdd11 --adapters none cea --seeds 5
longer --suites cdd11 --adapters descriptor --rates 0.03
longer --suites cdd11 --adapters mlp --rates 0.1

# Rates, on the validation hundred: one table of all lines.
mkdir -p data/results/rates
rates() { tinycea compare --split validation --out runs/rates $now "$@"; }
rates --suites aio5 --seeds 3 --adapters none
rates --suites aio5 --seeds 3 --adapters cea --rates 0.01 0.03 0.1 0.3 1
rates --suites aio5 --seeds 3 --adapters cea-softmax --rates 0.1 0.3 1
rates --suites aio5 --seeds 2 --adapters descriptor mlp --rates 0.03 0.1 0.3
rates --suites cdd11 --seeds 2 --adapters none
rates --suites cdd11 --seeds 2 --adapters cea --rates 0.000001 0.03 0.1 0.3 1
rates --suites cdd11 --seeds 2 --adapters descriptor mlp --rates 0.03 0.1 0.3
rates --suites patchwork --seeds 1 --adapters none
rates --suites patchwork --seeds 1 --adapters cea descriptor mlp --rates 0.03 0.1 0.3
rates() { tinycea compare --split validation --out runs/rates-longer --steps 4000 $now "$@"; }
rates --suites aio5 --seeds 3 --adapters none
rates --suites aio5 --seeds 3 --adapters cea --rates 0.01 0.03 0.1
rates --suites aio5 --seeds 2 --adapters descriptor --rates 0.03 0.1
rates --suites aio5 --seeds 2 --adapters mlp --rates 0.1 0.3
rates --suites cdd11 --seeds 2 --adapters none
rates --suites cdd11 --seeds 2 --adapters cea descriptor --rates 0.03 0.1
rates --suites cdd11 --seeds 2 --adapters mlp --rates 0.1 0.3
without() { tinycea compare --split validation --out runs/rates-without-sca --steps 4000 --suites aio5 --seeds 2 $now "$@"; }
without --adapters none:sca=false
without --adapters cea:sca=false descriptor:sca=false --rates 0.03 0.1 0.3

# What the instruments read of the layer without SCA, of seed 0 and the usual rate; and beside SCA, of seed 3 and the best rate.
instruments() {                                   # ADAPTER SEED RATE TEST
    python data/instruments.py "$4" "$(python -c "from pathlib import Path; from tinycea.lab import comparison
*_, recipe = comparison.grid(['aio5'], ['$1'], $2 + 1, [4000], [$3], str(Path('runs/photographs').resolve()))
print(comparison.model_path(recipe, Path('runs/told')))")"
}
instruments cea:sca=false 0 0.1 "$1" > data/results/stains/instruments-aio5.txt
instruments cea 3 0.03 "$1" > data/results/stains/instruments-aio5-sca.txt

# Do summaries help that are taught to know the degradation? (told/priors.txt is of an earlier form: data/priors.py of dc4bb2d.)
cp runs/told/runs.jsonl data/results/told/
folder=$1
taught() { python data/priors.py "$folder" runs/photographs runs/taught "$@"; }
taught "aio5:cea:sca=false@0.3+labels*0.3" "aio5:cea@0.1+labels*0.3" "aio5:descriptor@0.03+labels*0.3" --seeds 1
taught "aio5:cea:sca=false@0.1+labels*"{0.1,1,3} "aio5:cea@0.03+labels*0.1" --seeds 1
taught "aio5:"{cea@0.03,cea:sca=false@0.1,descriptor:sca=false@0.03,none@0.1}"+labels*0.3"
taught "aio5:descriptor:sca=false@0.03+truth*0.3" --seeds 2
taught "aio5:"{cea@0.03,descriptor@0.03,cea:sca=false@0.1,none@0.1}"+truth*0.3"
taught "aio5:"{cea@0.03,none@0.1}"+truth*0.3" --seeds 5
taught "aio5:"{cea@0.03,cea:sca=false@0.1}"+truth-mean*0.3"
taught "aio5:"{cea@0.03,none@0.1}"+faded*0.3"
taught "cdd11:"{cea,none}"@0.1+faded*0.3" --seeds 1
taught "cdd11:"{cea,none}"@0.1+truth*0.3" > data/results/told/taught.txt
cp runs/taught/runs.jsonl data/results/told/taught.jsonl
python data/priors.py "$1" runs/photographs runs/default "aio5:"{none,cea}"@0.1+"{"labels*0","truth*0.3"} \
    "aio5:cea@0.1+labels*0.3" --seeds 2 --steps 2400 --default > data/results/told/default.txt
cp runs/default/runs.jsonl data/results/told/default.jsonl

# The length: what networks make of so many steps, and a classifier alone, which shows how soon the degradation can be recognized.
curve() { tinycea compare --split validation --suites aio5 --seeds 1 --steps 500 1000 2000 4000 --out runs/curve $now "$@"; }
curve --adapters none told mlp
curve --adapters descriptor cea --rates 0.03
python data/recognizer.py "$1" > data/results/length/recognizer.txt
python - <<'END'
from pathlib import Path
from tinycea.lab.comparison import finished, format_rows, rows
from tinycea.runtime import machine
for folder, result in (("rates", "rates/table"), ("rates-longer", "rates/longer"), ("curve", "length/curve"),
                       ("rates-without-sca", "rates/without-sca"), ("told", "told/longer")):
    lines = [line for line in finished(f"runs/{folder}") if result != "told/longer" or line["recipe"].get("steps") != 1000]
    Path(f"data/results/{result}.txt").write_text(f"{format_rows(rows(lines))}\n{machine()}\n")
END
