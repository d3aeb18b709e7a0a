#!/bin/sh
# Two ranks on CPU: sh launch/cpu_two_ranks.sh --config configs/demo.yaml [a.b=c …]
set -eu
here=$(dirname -- "$0")
cores=$(getconf _NPROCESSORS_ONLN)

# Without it, on a machine with no GPU, two processes become two worlds of one.
export ACCELERATE_USE_CPU=true
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > 2 ? cores / 2 : 1 ))}"

# A launcher passes these on to its ranks, which save a checkpoint; by itself it would die of Slurm's SIGUSR1.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --config_file "$here/cpu_two_ranks.yaml" -m "${MODULE:-aplantida_dist.train}" "$@"
