#!/bin/sh
# Every GPU of this machine, or NUM_GPUS of them: sh launch/one_node.sh --config configs/teacher_global.yaml [a.b=c …]
set -eu
here=$(dirname -- "$0")
num_gpus=${NUM_GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$num_gpus" -eq 0 ]; then
    echo "error: no GPU here; use launch/cpu_two_ranks.sh" >&2
    exit 2
fi

# A launcher passes these on to its ranks, which save a checkpoint; by itself it would die of Slurm's SIGUSR1.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --config_file "$here/one_node.yaml" --num_processes "$num_gpus" \
    -m "${MODULE:-aplantida_dist.train}" "$@"
