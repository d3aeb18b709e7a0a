#!/bin/sh
# The proof, as a user would do it by hand; what is there already is not made again, so it may be interrupted.
#   sh launch/proof.sh long_tail                               every recipe of configs/proof/long_tail on a long-tailed herbarium
#   sh launch/proof.sh chain                                   global teacher, regional teacher, student from both, on a herbarium
#   sh launch/proof.sh chain NAME DATASET REGION [a.b=c …]     the same on a dataset of yours and a subset of it (docs/proof.md)
# SEEDS="0 1 2" and LAUNCH="sh launch/cpu_two_ranks.sh" may be set to others.
set -eu

seeds="${SEEDS:-0 1 2}"
launch="${LAUNCH:-sh launch/cpu_two_ranks.sh}"

# Functions in ( ) run in a shell of their own: what they name is theirs.
say() { printf '\n== %s\n' "$1"; }

train() (       # RUN_DIR CONFIG [a.b=c …]: trains, or goes on, or finds that nothing is left to do
    run_dir=$1 config=$2
    shift 2
    [ ! -f "$run_dir/done" ] || exit 0
    say "$run_dir"
    $launch --config "$config" --run-dir "$run_dir" "seed=$seed" "$@"
    touch "$run_dir/done"
)

evaluate() (    # RESULTS ROW RUN_DIR DATASET [--option …]: RESULTS/ROW.seed_N.json
    results=$1 row=$2 run_dir=$3 dataset=$4
    shift 4
    [ ! -f "$results/$row.seed_$seed.json" ] || exit 0
    mkdir -p "$results"
    python -m aplantida_dist.evaluate --run "$run_dir" --data "$dataset" --json "$results/$row.seed_$seed.json" "$@"
)

herbarium() (   # DATASET [--option …]: draws it and builds its shards
    dataset=$1 pictures=demo/$(basename "$1")
    shift
    [ ! -d "$dataset" ] || exit 0
    say "drawing and building $dataset"
    rm -rf "$pictures"
    python -m aplantida_dist.herbarium --out "$pictures" --side 64 "$@"
    python shards/build.py --from-folder "$pictures" --out "$dataset"
)

long_tail() (
    herbarium shards/proof_tail --species 40 --pictures 1600 --even-share 0 --held-out 5 30
    runs=runs/proof/long_tail
    for seed in $seeds; do
        for config in configs/proof/long_tail/*.yaml; do
            recipe=$(basename "$config" .yaml)
            train "$runs/$recipe.seed_$seed" "$config"
            evaluate "$runs/test" "$recipe" "$runs/$recipe.seed_$seed" shards/proof_tail
        done
        evaluate "$runs/test" cross_entropy_post_hoc "$runs/cross_entropy.seed_$seed" shards/proof_tail --logit-adjustment 1
    done
    say "the long tail, test split"
    python -m bench.proof "$runs/test" --against cross_entropy --metrics macro_top1 many_top1 medium_top1 few_top1
)

chain() (
    name=$1 dataset=$2 region=$3
    shift 3
    runs=runs/proof/$name configs=configs/proof/chain
    for seed in $seeds; do
        global=$runs/teacher_global.seed_$seed
        regional=$runs/teacher_regional.seed_$seed
        labels=$runs/student_labels.seed_$seed
        distilled=$runs/student_distilled.seed_$seed
        train "$global" "$configs/teacher_global.yaml" "data.dataset=$dataset" "$@"
        train "$regional" "$configs/teacher_regional.yaml" "data.dataset=$region" "model.init_from=$global" "$@"
        train "$distilled" "$configs/student.yaml" "data.dataset=$dataset" "distillation.teachers=[$global,$regional]" "$@"
        train "$labels" "$configs/student.yaml" "data.dataset=$dataset" "$@"

        evaluate "$runs/teachers_on_region" global "$global" "$region" --other-classes count
        evaluate "$runs/teachers_on_region" global_leave_out "$global" "$region" --other-classes leave-out
        evaluate "$runs/teachers_on_region" regional "$regional" "$region"
        for student in labels distilled; do
            evaluate "$runs/students" $student "$runs/student_$student.seed_$seed" "$dataset"
            evaluate "$runs/students_on_region" $student "$runs/student_$student.seed_$seed" "$region" --other-classes count
        done
        evaluate "$runs/students" teacher_global "$global" "$dataset"
    done
    say "$name: the teachers on the region's test split"
    python -m bench.proof "$runs/teachers_on_region" --against global_leave_out
    say "$name: the students on the whole test split"
    python -m bench.proof "$runs/students" --against labels
    say "$name: the students on the region's test split"
    python -m bench.proof "$runs/students_on_region" --against labels
)

case "${1:-}" in
long_tail)
    long_tail ;;
chain)
    if [ $# -eq 1 ]; then
        herbarium shards/proof_global --species 32 --pictures 4800 --held-out 10 60
        [ -d shards/proof_region ] ||
            python shards/build.py --from-dataset shards/proof_global --where region=EU_E --out shards/proof_region
        set -- chain herbarium shards/proof_global shards/proof_region
    fi
    [ $# -ge 4 ] || { echo "error: chain takes NAME DATASET REGION [a.b=c …], or nothing" >&2; exit 2; }
    shift
    chain "$@" ;;
*)
    echo "error: expected long_tail or chain; sh launch/proof.sh chain [NAME DATASET REGION [a.b=c …]]" >&2
    exit 2 ;;
esac
