#!/bin/sh
# One process on one GPU: sh launch/one_gpu.sh --config configs/teacher_global.yaml [a.b=c …]
set -eu
here=$(dirname -- "$0")

exec accelerate launch --config_file "$here/one_gpu.yaml" -m "${MODULE:-aplantida_dist.train}" "$@"
