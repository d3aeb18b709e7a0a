#!/bin/sh
# The demo, as a user would do it by hand: every line below is a command of the README.
set -eu

pictures=demo/herbarium
dataset=shards/demo
run=runs/demo

say() { printf '\n== %s\n' "$1"; }

if [ ! -f "$pictures/metadata.jsonl" ]; then    # written last: without it a drawing was interrupted
    rm -rf "$pictures"
    say "drawing a herbarium: $pictures"
    python -m aplantida_dist.herbarium --out "$pictures"
fi
if [ ! -d "$dataset" ]; then
    say "building its shards: $dataset"
    python shards/build.py --from-folder "$pictures" --out "$dataset"
fi
say "training on two processes: $run (the same command again goes on where it stopped)"
sh launch/cpu_two_ranks.sh --config configs/demo.yaml --run-dir "$run"
say "evaluating the best checkpoint on pictures it has never seen"
python -m aplantida_dist.evaluate --run "$run" --data "$dataset" --split test --predictions "$run/test_predictions.jsonl" --json "$run/test.json"
say "what came out"
python -m aplantida_dist.analyze "$run"
cat <<END

history      $run/history.jsonl
plots        $run/report/report.html
checkpoints  $run/checkpoints

Your own pictures, in a folder a class:
  python shards/build.py --from-folder PICTURES --out shards/mine
  sh launch/cpu_two_ranks.sh --config configs/demo.yaml --run-dir runs/mine data.dataset=shards/mine
(first: . .venv/bin/activate)
END
