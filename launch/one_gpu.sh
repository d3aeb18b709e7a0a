#!/bin/sh
# One process on one GPU: sh launch/one_gpu.sh --config configs/teacher_global.yaml [a.b=c …]
set -eu
here=$(dirname -- "$0")

# A launcher passes these on to its ranks, which save a checkpoint; by itself it would die of Slurm's SIGUSR1.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --config_file "$here/one_gpu.yaml" -m "${MODULE:-aplantida_dist.train}" "$@"
