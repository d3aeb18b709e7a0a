#!/bin/sh
# Run on every node, with its own NODE_RANK (0 … NUM_NODES − 1):
#   NUM_NODES=2 NODE_RANK=0 MAIN_NODE=10.0.0.1 sh launch/several_nodes.sh --config configs/teacher_global.yaml [a.b=c …]
# NUM_GPUS is the GPUs of each node (default: this one's). MAIN_NODE is node 0; its MAIN_PORT (29500) must be open to the others.
set -eu
here=$(dirname -- "$0")
num_gpus=${NUM_GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
num_nodes=${NUM_NODES:?the number of nodes}

# A launcher passes these on to its ranks, which save a checkpoint; by itself it would die of Slurm's SIGUSR1.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec accelerate launch --config_file "$here/several_nodes.yaml" \
    --num_machines "$num_nodes" --num_processes "$(( num_nodes * num_gpus ))" \
    --machine_rank "${NODE_RANK:?which node this is, from 0}" \
    --main_process_ip "${MAIN_NODE:?name or address of node 0}" --main_process_port "${MAIN_PORT:-29500}" \
    -m "${MODULE:-aplantida_dist.train}" "$@"
